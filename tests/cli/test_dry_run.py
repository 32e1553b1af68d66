"""qmoe compress --dry-run: the plan as a table and as JSON, and nothing on the disk."""

import dataclasses
import importlib

import pytest

import qmoe_jax as qj
from qmoe_jax.cli import samples
from qmoe_jax.cli.plan_table import plan_table
from qmoe_jax.compression.planning.plan import planned_passes
from qmoe_jax.compression.planning.rates import H100
from qmoe_jax.compression.planning.resources import Limits
from qmoe_jax.data import Tokenizer
from tests.helpers.cli_runs import answer, compress_arguments, qmoe


@pytest.fixture(autouse=True)
def given_rates(monkeypatch):
    """Rates as if measured: measuring takes seconds."""
    rates = dataclasses.replace(H100, shares_cores=True)
    module = importlib.import_module(
        "qmoe_jax.compression.planning.plan"
    )  # the package has a function of this name
    monkeypatch.setattr(module, "measure_rates", lambda model, folder: rates)


def test_a_dry_run_tells_bytes_and_time_and_writes_nothing(model, texts, tmp_path):
    arguments = [*compress_arguments(model, texts, tmp_path / "out"), "--dry-run"]
    before = sorted(tmp_path.rglob("*"))
    found = answer(*arguments)
    assert found["tokens"]["samples"] == 24
    assert found["scratch_bytes"]["total"] > 0 and found["problems"] == []
    assert len(found["passes"]) == 2 + 2 + 1 + 4  # two sparse layers per stack, the encoder's end
    shown = qmoe(*arguments)
    assert shown.exit_code == 0, shown.output
    for text in ("24 samples", "scratch", "hidden states", "in all"):
        assert text in shown.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_that_does_not_fit_exits_with_an_error_and_the_remedy(model, texts, tmp_path, monkeypatch):
    small = Limits(memory=10**8)
    monkeypatch.setattr(Limits, "here", classmethod(lambda cls, output, scratch: small))
    result = qmoe(*compress_arguments(model, texts, tmp_path / "out"), "--dry-run")
    assert result.exit_code == 1
    assert "takes more memory than there is" in result.stderr and "remedy: " in result.stderr
    assert "in all" in result.stdout


def test_a_plan_for_other_machines(model, texts, tmp_path):
    arguments = [*compress_arguments(model, texts, tmp_path / "out"), "--dry-run", "--assume", "h100"]
    found = answer(*arguments, "--hosts", 2, "--devices", 8)
    assert (found["hosts"], found["devices"], found["rates"]["name"]) == (2, 8, H100.name)
    assert set(found["limits"].values()) == {None, False}


@pytest.mark.parametrize("options", [["--hosts", "2"], ["--assume", "h100"]])
def test_options_of_plans_are_refused_without_one(model, texts, tmp_path, options):
    result = qmoe(*compress_arguments(model, texts, tmp_path / "out"), *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--dry-run" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_large_text_is_estimated_from_its_first_documents(model, texts, monkeypatch):
    tokenizer = Tokenizer(model)
    options = samples.SampleOptions(100, None, None, None, 0)
    exact = options.count_tokens([str(texts)], tokenizer)
    monkeypatch.setattr(samples, "SMALL_TEXT", 0)
    monkeypatch.setattr(samples, "PROBE", 50)
    estimated = options.count_tokens([str(texts)], tokenizer)
    assert exact.samples == estimated.samples == 100
    assert estimated.encoder == pytest.approx(exact.encoder, rel=0.1)
    segments = dataclasses.replace(options, segment=64).count_tokens([str(texts)], tokenizer)
    assert segments == qj.TokenCounts(100, 5760, 1280)


def test_layers_that_take_the_same_time_are_one_row_of_the_table(data):
    model = qj.PRESETS["switch-c-2048"]
    tokens = qj.TokenCounts(160_000, 82_000_000, 20_000_000)
    found = qj.plan(data / "hf_tiny_a", tokens, rates=H100)
    passes = planned_passes(model, qj.CompressionConfig(), tokens, H100)
    table = plan_table(dataclasses.replace(found, passes=passes))
    rows = [str(cell) for cell in table.columns[1].cells]
    assert any(row.startswith("encoder layer 0 to 14, each: ") for row in rows)
