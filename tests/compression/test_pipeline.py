"""The whole compression against upstream's own runs, and its own promises: resumption, counting, refusal."""

import hashlib
import json

import numpy as np
import pytest
from helpers.golden_digits import Problem

import qmoe_jax as qj
from qmoe_jax.compression import pipeline
from qmoe_jax.compression.exact import FOLDER

KERNELS = ("encoder/layers_1", "encoder/layers_3", "decoder/layers_1", "decoder/layers_3")
EQUAL_DIGITS = 0.996  # in the first layer that differs at all: a row in a hundred may meet a border
EQUAL_BEHIND = 0.95  # in those behind it, calibrated on what followed
LEVEL_ROUNDING = 0.06  # levels rounded to bfloat16 alone move a sample's loss by .03


def stored_bytes(path):
    files = [path / "manifest.json", *sorted(p for p in (path / "experts").rglob("*") if p.is_file())]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_digit_follows_from_its_hessian_and_those_before(compressed):
    compressed()
    assert len(compressed.gptq_calls) == 2 * len(KERNELS)
    for w, hessian, q in compressed.gptq_calls:
        for number in range(len(w)):
            problem = Problem.of(w[number], hessian[number], fallback=bool(q.fallback[number]))
            expert = problem.replay(q.digits[number], q.levels[number])
            expert.assert_digits_follow()
            expert.assert_levels_follow()


def test_digits_are_upstreams(data, compressed):
    """Each layer is calibrated on the outputs of those before: behind the first that differs, others may follow."""
    golden = np.load(data / "e2e_tiny_a_gptq_digits.npz")
    reader = qj.open_checkpoint(compressed()[0])
    differed = None

    def place(key):
        _, stack, _, layer, matrix, _ = key.split(".")
        return KERNELS.index(f"{stack}/layers_{layer}"), matrix

    assert len(golden.files) == 2 * len(KERNELS)
    for key in sorted(golden.files, key=place):
        _, stack, _, layer, matrix, _ = key.split(".")
        kernel = reader.read(f"{stack}/layers_{layer}/mlp/expert/{matrix}/kernel").swapaxes(1, 2)
        equal = np.mean(np.sign(kernel) == np.array([0, -1, 1])[golden[key]])
        first = differed in (None, (stack, layer))
        assert equal >= (EQUAL_DIGITS if first else EQUAL_BEHIND), (
            f"{key}: {equal:.4f} of the digits are equal"
        )
        if equal < 1 and first:
            differed = stack, layer


@pytest.mark.parametrize(("run", "options"), [("rtn1.5", {"method": "nearest"}), ("gptq1.5", {})])
def test_losses_are_upstreams(data, samples, compressed, run, options):
    expected = json.loads((data / "e2e_tiny_a.json").read_text())["runs"][run]["per_sample_val_loss"]
    model, params = qj.load_compressed(compressed(**options)[0])
    found = qj.evaluate(model, params, samples[16:]).per_example
    assert np.abs(found - expected).mean() <= LEVEL_ROUNDING


def test_calibration_tokens_are_upstreams(data, samples, compressed):
    printed = json.loads((data / "e2e_tiny_a.json").read_text())["runs"]["gptq1.5"]
    _, report = compressed()
    routed = [sum(group.tokens) for group in report.groups if group.stack == "encoder"]
    assert routed == [sum(len(encoder) for encoder, _ in samples[:16])] * 2
    assert {(f.stack, f.layer, f.expert) for f in report.fallbacks} == {
        ("decoder", 3, 6)
    }  # 3 tokens, all masked
    assert printed["trainsamples_used"] == 16


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2},
        {"bits": 3, "method": "nearest"},
        {"bits": 4, "group_size": 32, "activation_order": True},
        {"group_size": 32, "activation_order": True},
        {"skip": "encoder"},
        {"true_sequential": True, "keep_sentinels": True, "codebook": "tunstall-6"},
        {"codebook": "upstream"},
        {"level_dtype": "float32"},
    ],
    ids=str,
)
def test_every_kind_of_artifact_is_whole_and_runs(samples, compressed, options):
    path, report = compressed(**options)
    assert qj.verify(path).ok
    model, params = qj.load_compressed(path)
    dense, dense_params = qj.load_model(path)
    few = samples[16:18]
    packed_loss, dense_loss = (
        qj.evaluate(m, p, few).loss for m, p in ((model, params), (dense, dense_params))
    )
    assert packed_loss == pytest.approx(dense_loss, rel=1e-4)
    stacks = {group.stack for group in report.groups}
    assert stacks == ({"decoder"} if options.get("skip") == "encoder" else {"encoder", "decoder"})


@pytest.mark.parametrize(
    "options", [{"experts_per_group": 3}, {"bits": 2, "group_size": 16, "experts_per_group": 5}], ids=str
)
def test_a_stopped_run_goes_on_to_the_same_bytes(data, samples, compressed, tmp_path, monkeypatch, options):
    class Stopped(Exception):
        pass

    real, calls = pipeline.compress_group, []

    def stop_at_the_fifth(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise Stopped
        return real(*arguments)

    config = qj.CompressionConfig(sentinel_start=480, **options)
    monkeypatch.setattr(pipeline, "compress_group", stop_at_the_fifth)
    with pytest.raises(Stopped):
        qj.compress(data / "hf_tiny_a", tmp_path / "model", samples[:16], config)
    with pytest.raises(qj.CheckpointError, match="is unfinished"):
        qj.load_compressed(tmp_path / "model")
    report = qj.compress(data / "hf_tiny_a", tmp_path / "model", samples[:16], config)
    monkeypatch.setattr(pipeline, "compress_group", real)
    path, whole = compressed(**options)
    assert len(calls) == 5 + len(whole.groups) - 4  # four groups were not quantized again
    assert stored_bytes(tmp_path / "model") == stored_bytes(path)
    assert [group.tokens for group in report.groups] == [group.tokens for group in whole.groups]
    assert not (tmp_path / "model" / FOLDER).exists()


def test_a_finished_artifact_is_left_as_it_is(data, samples, compressed, monkeypatch):
    path, report = compressed()
    before = stored_bytes(path)
    monkeypatch.setattr(pipeline, "compress_group", None)
    again = qj.compress(data / "hf_tiny_a", path, samples[:16], qj.CompressionConfig(sentinel_start=480))
    assert stored_bytes(path) == before
    assert again.groups == report.groups


def test_other_samples_are_another_run(data, samples, compressed):
    path, _ = compressed()
    with pytest.raises(qj.CheckpointError, match="another run"):
        qj.compress(data / "hf_tiny_a", path, samples[:15], qj.CompressionConfig(sentinel_start=480))


@pytest.mark.parametrize(
    ("examples", "config", "message"),
    [
        ([], {"sentinel_start": 480}, "no calibration examples"),
        ([([5, 600], [0, 1])], {"sentinel_start": 480}, "example 0, encoder: expected ids of 0 to 511"),
        ([([5], [0, 1])], {}, "sentinel_start: needed for a vocabulary of 512"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(data, tmp_path, examples, config, message):
    pairs = [(np.array(encoder), np.array(decoder)) for encoder, decoder in examples]
    with pytest.raises(ValueError, match=message):
        qj.compress(data / "hf_tiny_a", tmp_path / "model", pairs, qj.CompressionConfig(**config))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 5),
        ("method", "magic"),
        ("damping", -0.1),
        ("group_size", 0),
        ("codebook", "huffman"),
        ("skip", "both"),
    ],
)
def test_options_without_a_meaning_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        qj.CompressionConfig(**{field: value})


def test_decompressed_is_what_was_packed(samples, compressed, tmp_path):
    path, _ = compressed()
    reader = qj.open_checkpoint(path)
    dense = qj.open_checkpoint(qj.decompress(path, tmp_path / "t5x", format="t5x"))
    assert dense.names() == reader.names()
    for name in reader.names():
        np.testing.assert_array_equal(np.float32(dense.read(name)), np.float32(reader.read(name)), name)
