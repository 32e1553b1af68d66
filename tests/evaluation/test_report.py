"""Variants side by side: figures recomputed from files and weights, table, plots."""

import dataclasses
import json

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.artifact.report import fallback_reason
from qmoe_jax.evaluation.report import COLUMNS, calibration_notes, markdown_table, write_report
from qmoe_jax.evaluation.variants import Variant


@pytest.fixture(scope="module")
def variants(data, tmp_path_factory):
    generator = np.random.default_rng(0)
    draw = lambda n: generator.integers(2, 480, n).astype(np.int32)
    examples = [(draw(30), np.append(0, draw(6)).astype(np.int32)) for _ in range(4)]
    path = tmp_path_factory.mktemp("report") / "ternary"
    report = qj.compress(data / "hf_tiny_a", path, examples, qj.CompressionConfig(sentinel_start=480))
    evaluation = qj.evaluate(*qj.load_compressed(path), examples)
    original = Variant("original", qj.evaluate(*qj.load_model(data / "hf_tiny_a"), examples))
    return path, [original, Variant("ternary", evaluation, report)]


def test_bits_per_parameter_are_measured_on_disk(variants):
    path, (original, ternary) = variants
    experts = sum(file.stat().st_size for file in (path / "experts").rglob("*") if file.is_file())
    parameters = 4 * 8 * 2 * 64 * 128
    expected = 8 * (experts + (path / "codebooks.safetensors").stat().st_size) / parameters
    assert ternary.bits_per_expert_parameter == pytest.approx(expected)
    assert original.bits_per_expert_parameter == 16


def test_sparsity_and_entropy_are_those_of_the_weights(variants):
    path, (_, ternary) = variants
    reader = qj.open_checkpoint(path)
    shares = [
        np.mean(expert == 0)
        for name in reader.names()
        if "/mlp/expert/" in name
        for expert in reader.read(name)
    ]
    assert ternary.report.sparsity == pytest.approx(np.mean(shares))
    bits = [-z * np.log2(z) - (1 - z) * np.log2((1 - z) / 2) for z in shares]
    assert ternary.report.entropy == pytest.approx(np.mean(bits))


def test_notes_name_experts_without_calibration_tokens(variants):
    _, (_, ternary) = variants
    starved = [layer for layer in ternary.report.layers if layer.fallback]
    assert starved, "24 decoder tokens cannot reach all 8 experts of both layers"
    notes = " ".join(calibration_notes(ternary.report))
    for layer in starved:
        named = ", ".join(f"{expert} (0 tokens)" for expert in layer.fallback)
        assert f"{layer.name}: rounded to nearest, no calibration tokens: experts {named}" in notes


def test_notes_tell_experts_without_tokens_from_those_without_a_factor(variants):
    _, (_, ternary) = variants
    group = ternary.report.groups[0]
    report = dataclasses.replace(
        ternary.report,
        groups=(dataclasses.replace(group, calibration_tokens=(0, 51, 9, 9, 9, 9, 9, 9), matrices={
            "wi": dataclasses.replace(group.matrices["wi"], fallback=(True, True, *[False] * 6))
        }),),
    )  # fmt: skip
    assert calibration_notes(report)[:2] == [
        f"{group.layer_name}: rounded to nearest, no calibration tokens: experts 0 (0 tokens)",
        f"{group.layer_name}: rounded to nearest, a Hessian that is zero or has no Cholesky factor "
        "(more damping may help): experts 1 (51 tokens)",
    ]
    assert [each.reason for each in report.fallbacks] == [fallback_reason(0), fallback_reason(51)]


def test_the_report_folder_has_table_plots_and_figures(variants, tmp_path):
    _, rows = variants
    write_report(tmp_path, rows, {"checkpoint": "tiny"})
    text = (tmp_path / "report.md").read_text()
    assert markdown_table(rows) in text
    assert all(len(line.split(" | ")) == len(COLUMNS) for line in markdown_table(rows).splitlines())
    for plot in ("loss.png", "layers.png", "tokens.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
        assert f"({plot})" in text
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["variants"][1]["evaluation"]["loss"] == rows[1].evaluation.loss
