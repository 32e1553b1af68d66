"""qmoe compress: its answer, its refusals before any work, and resumption."""

import shutil

import pytest
from rich.console import Console

import qmoe_jax as qj
from qmoe_jax.artifact.report import GroupReport, MatrixReport
from qmoe_jax.artifact.sizes import measure
from qmoe_jax.cli.compress import result_table
from qmoe_jax.compression.passes import experts
from qmoe_jax.data import Tokenizer
from tests.helpers.cli_runs import answer, compress_arguments, qmoe


def test_the_answer_of_a_compression_equals_the_files_on_disk(compressed):
    artifact, found = compressed
    assert qj.verify(artifact).ok
    sizes = found["sizes"]
    expert_bytes = sum(path.stat().st_size for path in artifact.glob("experts/*/*"))
    assert sum(sizes["expert_parts"].values()) == expert_bytes
    bits = 8 * (expert_bytes + sizes["codebook_bytes"]) / sizes["expert_parameters"]
    assert found["bits_per_expert_parameter"] == pytest.approx(bits)
    assert 0.5 < found["sparsity"] < 1
    assert found["samples"] == 24
    assert found["rounded_to_nearest"] == []


def test_a_compression_stores_the_tokenizer_and_its_first_sentinel(artifact, model):
    assert (artifact / "tokenizer.model").read_bytes() == (model / "spiece.model").read_bytes()
    start = qj.open_checkpoint(artifact).manifest.run.options["sentinel_start"]
    assert start == Tokenizer(model).sentinels.start


def test_an_interrupted_compression_says_how_to_resume_and_ends_the_same(
    compressed, model, texts, tmp_path, monkeypatch
):
    arguments = compress_arguments(model, texts, tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["/bin/qmoe", *map(str, arguments)])
    calls = []

    def stop_at_the_third_group(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:  # of two matrices per group
            raise KeyboardInterrupt
        return quantize(*args, **kwargs)

    quantize = experts.quantize
    with monkeypatch.context() as patch:
        patch.setattr(experts, "quantize", stop_at_the_third_group)
        result = qmoe(*arguments)
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"safe in {tmp_path / 'out'}" in result.stderr
    assert (tmp_path / "out.log").read_text().endswith("stopped by Ctrl-C\n")
    assert result.stderr.splitlines()[-1].strip().startswith(f"qmoe compress '{model}'")
    assert qmoe("verify", tmp_path / "out").exit_code == 3

    groups = sorted((tmp_path / "out").glob("experts/*/*"))
    written = [path.stat().st_mtime_ns for path in groups]
    assert len(groups) == 2
    answer(*arguments)
    assert (tmp_path / "out.log").read_text().endswith(" end\n")
    assert [path.stat().st_mtime_ns for path in groups] == written
    manifests = [path / "manifest.json" for path in (tmp_path / "out", compressed[0])]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codebook", "huffman"], "codebook: expected one of"),
        (["--max-tokens", "5"], "cut longer texts into segments"),
        (["--segment", "1000"], "no text of at least 500 tokens, half a segment"),
        (["--split", "dev"], 'no text with "split": "dev"'),
        (["--extra-ids", "300"], "expected: at most 512, the model's vocabulary"),
        (["--tokenizer", "no.model"], "no.model: no sentencepiece model there"),
        (["--calibration", "no.jsonl"], "no.jsonl: no text found"),
    ],
)
def test_bad_options_are_refused_before_any_work(model, texts, tmp_path, options, message):
    result = qmoe(*compress_arguments(model, texts, tmp_path / "out"), *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_found_in_the_folder_above_the_checkpoint(data, folder, texts, tmp_path):
    t5x = shutil.copytree(data / "t5x/switch_c_tiny_f32/checkpoint_1000", tmp_path / "checkpoint_1000")
    arguments = compress_arguments(t5x, texts, tmp_path / "out")
    result = qmoe(*arguments)
    assert result.exit_code == 1
    assert "expected: tokenizer.model or spiece.model there, or in the directory above" in result.stderr
    shutil.copyfile(folder / "tokenizer.model", tmp_path / "tokenizer.model")
    result = qmoe(*arguments, "--max-tokens", 5)
    assert "no text of fewer than 5 tokens" in result.stderr


def test_a_tokenizer_far_smaller_than_the_vocabulary_gives_a_warning(model, texts, tmp_path):
    arguments = compress_arguments(model, texts, tmp_path / "out")
    result = qmoe(*arguments, "--extra-ids", 8, "--max-tokens", 5)
    assert "the model has 512; check that it was trained with them" in result.stderr


def group(start: int, calibrated: tuple[int, ...], fallback: tuple[bool, ...]) -> GroupReport:
    nothing = (0.0,) * len(calibrated)
    matrix = MatrixReport(nothing, nothing, nothing, (0,) * len(calibrated), fallback)
    return GroupReport("encoder", 1, start, calibrated, calibrated, {"wi": matrix, "wo": matrix}, 0.0)


def test_under_calibrated_experts_are_named_with_their_tokens(compressed):
    groups = (group(0, (100, 5), (False, False)), group(2, (0, 95), (True, False)))
    report = qj.CompressionReport(groups, 1.0, path=compressed[0], sizes=measure(compressed[0]))
    assert report.under_calibrated() == {"encoder 1": {2: 0}}
    console = Console(width=200)
    with console.capture() as capture:
        console.print(result_table(report))
    rows = dict(line.split("  ", 1) for line in capture.get().splitlines() if "  " in line.strip())
    assert "1 expert, no calibration tokens: encoder 1 expert 2 (0 tokens)" in rows["rounded to nearest"]
    assert (
        "1 expert, fewer than 10% of the mean number of tokens: encoder 1 expert 2 (0 tokens)"
        in rows["under-calibrated"]
    )
