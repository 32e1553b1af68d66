"""inspect, verify, evaluate and convert on a real model and its artifact."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.data import Tokenizer, samples
from tests.helpers.cli_runs import answer, qmoe


def test_inspect_shows_what_a_checkpoint_holds(data):
    found = answer("inspect", data / "t5x/switch_c_tiny_f32/checkpoint_1000")
    assert found["format"] == "t5x"
    assert found["config"]["num_experts"] == 8
    assert found["parameters"] == sum(found["dtypes"].values())
    shown = qmoe("inspect", data / "t5x/switch_c_tiny_f32/checkpoint_1000").stdout
    assert f"{found['parameters']:,}" in shown
    assert "encoder 0-3" in shown


def test_inspect_measures_an_artifact(artifact, compressed):
    found = answer("inspect", artifact)["compression"]
    assert found["bits_per_expert_parameter"] == compressed[1]["bits_per_expert_parameter"]
    assert found["options"]["bits"] == "ternary"
    shown = qmoe("inspect", artifact).stdout
    assert f"{found['bits_per_expert_parameter']:.4f} per expert parameter" in shown


def test_inspect_names_damaged_files(artifact, tmp_path):
    damaged = shutil.copytree(artifact, tmp_path / "damaged")
    group = next(damaged.glob("experts/*/*"))
    group.write_bytes(group.read_bytes()[:-8])
    found = answer("inspect", damaged)
    assert [shard["name"] for shard in found["damaged"]] == [str(group.relative_to(damaged))]
    assert "compression" not in found
    assert str(group.relative_to(damaged)) in qmoe("inspect", damaged).stdout


def test_verify_accepts_an_intact_artifact(artifact):
    result = qmoe("verify", artifact)
    assert (result.exit_code, result.stderr) == (0, "")
    assert ": OK: " in result.stdout
    assert answer("verify", artifact)["bytes"] > 0


def test_verify_names_a_flipped_bit(artifact, tmp_path):
    damaged = shutil.copytree(artifact, tmp_path / "damaged")
    group = next(damaged.glob("experts/*/*"))
    content = bytearray(group.read_bytes())
    content[-100] ^= 1
    group.write_bytes(content)
    found = answer("verify", damaged, exit_code=3)
    assert not found["ok"]
    assert any(str(group.relative_to(damaged)) in problem for problem in found["problems"])
    assert str(group.relative_to(damaged)) in qmoe("verify", damaged).stdout


def test_verify_refuses_what_is_not_an_artifact(model, tmp_path):
    result = qmoe("verify", model)
    assert result.exit_code == 1
    assert f"error: {model}: is not an artifact" in result.stderr
    assert qmoe("verify", tmp_path / "missing").exit_code == 1


def test_evaluate_gives_the_figures_of_the_api_on_the_same_samples(model, texts):
    expected = qj.evaluate(*qj.load_model(model), samples(texts, Tokenizer(model), 20, seed=3))
    found = answer("evaluate", model, "--text", texts, "--samples", 20, "--seed", 3)
    assert (found["samples"], found["tokens"]) == (20, expected.tokens)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert (
        f"{expected.loss:.4f} nats"
        in qmoe("evaluate", model, "--text", texts, "--samples", 20, "--seed", 3).stdout
    )


def test_evaluate_takes_segments_of_one_split(model, texts):
    expected = samples(texts, Tokenizer(model), 6, segment=16, split="test")
    arguments = ("--text", texts, "--segment", 16, "--split", "test", "--samples", 6)
    found = answer("evaluate", model, *arguments)
    assert found["samples"] == len(expected) > 3
    assert found["tokens"] == sum(len(example.decoder) - 1 for example in expected)


def test_evaluate_runs_a_compressed_model_packed(artifact, texts, monkeypatch):
    loaded = []
    load = qj.load_compressed
    monkeypatch.setattr(
        qj, "load_compressed", lambda *args, **options: loaded.append(args) or load(*args, **options)
    )
    found = answer("evaluate", artifact, "--text", texts, "--samples", 20)
    assert found["format"] == "qmoe"
    assert len(loaded) == 1


@pytest.mark.parametrize("form", ["t5x", "huggingface"])
def test_convert_decompresses_to_the_values_of_the_artifact(artifact, tmp_path, form):
    found = answer("convert", artifact, tmp_path / "out", "--to", form)
    dense, packed = qj.open_checkpoint(found["output"]), qj.open_checkpoint(artifact)
    assert dense.format == form
    for name in packed.names():
        np.testing.assert_array_equal(dense.read(name), packed.read(name))
    assert Path(found["tokenizer"]).read_bytes() == (artifact / "tokenizer.model").read_bytes()


def test_commands_take_file_urls_and_files_within(model, artifact, texts):
    arguments = ("--text", texts, "--samples", 4)
    expected = answer("evaluate", model, *arguments)["loss"]
    assert answer("evaluate", model.as_uri(), *arguments)["loss"] == expected
    assert answer("evaluate", model / "config.json", *arguments)["loss"] == expected
    assert qmoe("verify", artifact.as_uri()).exit_code == 0
    assert answer("inspect", (artifact / "manifest.json").as_uri())["format"] == "qmoe"


def test_commands_print_what_opening_had_to_decide(model, tmp_path, texts):
    run = tmp_path / "run"
    shutil.copytree(model, run / "checkpoint-5")
    (run / "checkpoint-10").mkdir()
    result = qmoe("evaluate", run, "--text", texts, "--samples", 4)
    assert result.exit_code == 0
    assert "newer steps are skipped: checkpoint-10: is an unfinished step" in result.stderr


def test_convert_to_upstream_keeps_every_expert_weight(artifact, tmp_path):
    found = answer("convert", artifact, tmp_path / "out", "--to", "upstream")
    # Upstream's loader takes every other file for torch's.
    assert found["tokenizer"] is None
    assert {path.suffix for path in (tmp_path / "out").iterdir() if path.name != "config.json"} == {".pt"}
    upstream, ours = qj.open_checkpoint(tmp_path / "out"), qj.open_checkpoint(artifact)
    assert upstream.format == "upstream"
    experts = [name for name in ours.names() if "/expert/" in name]
    assert len(experts) == 8
    for name in experts:
        np.testing.assert_array_equal(upstream.read(name), ours.read(name))


def test_convert_copies_the_files_that_name_the_tokenizers_sentinels(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"extra_ids": 40}')
    answer("convert", tmp_path / "model", tmp_path / "out", "--to", "huggingface")
    assert Tokenizer(tmp_path / "out").sentinels.count == 40


def test_convert_to_upstream_refuses_dense_checkpoints(model, tmp_path):
    result = qmoe("convert", model, tmp_path / "out", "--to", "upstream")
    assert result.exit_code == 1
    assert "found: a huggingface checkpoint" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_installed_command_reports_an_error_without_a_traceback(data):
    executable = Path(sys.executable).with_name("qmoe")
    arguments = [executable, "inspect", data / "no" / "such"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {data / 'no' / 'such'}: no such file or directory\n")
    assert "Traceback" not in result.stderr
