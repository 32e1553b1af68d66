"""Variants side by side: figures recomputed from the files, table, plots."""

import json

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.evaluation.report import COLUMNS, calibration_notes, markdown_table, write_report
from qmoe_jax.evaluation.variants import Variant, read_variant, ternary_entropy


@pytest.fixture(scope="module")
def variants(data, tmp_path_factory):
    generator = np.random.default_rng(0)
    draw = lambda n: generator.integers(2, 480, n).astype(np.int32)
    examples = [(draw(30), np.append(0, draw(6)).astype(np.int32)) for _ in range(4)]
    path = tmp_path_factory.mktemp("report") / "ternary"
    qj.compress(data / "hf_tiny_a", path, examples, qj.CompressionConfig(sentinel_start=480))
    evaluation = qj.evaluate(*qj.load_compressed(path), examples)
    original = Variant("original", qj.evaluate(*qj.load_model(data / "hf_tiny_a"), examples))
    return path, [original, read_variant("ternary", path, evaluation)]


def test_bits_are_those_of_the_files(variants):
    path, (original, ternary) = variants
    experts = sum(file.stat().st_size for file in (path / "experts").rglob("*") if file.is_file())
    parameters = 4 * 8 * 2 * 64 * 128
    expected = 8 * (experts + (path / "codebooks.safetensors").stat().st_size) / parameters
    assert ternary.bits_per_expert_parameter == pytest.approx(expected)
    assert original.bits_per_expert_parameter == 16


def test_zeros_and_entropy_are_those_of_the_weights(variants):
    path, (_, ternary) = variants
    reader = qj.open_checkpoint(path)
    shares = [
        np.mean(expert == 0)
        for name in reader.names()
        if "/mlp/expert/" in name
        for expert in reader.read(name)
    ]
    assert ternary.sparsity == pytest.approx(np.mean(shares))
    assert ternary.entropy == pytest.approx(np.mean([ternary_entropy(float(z)) for z in shares]))


def test_entropy_of_a_known_source():
    assert ternary_entropy(0.885) == pytest.approx(0.63, abs=0.001)
    assert ternary_entropy(1.0) == 0


def test_experts_without_tokens_are_named(variants):
    _, (_, ternary) = variants
    starved = [layer for layer in ternary.layers if layer.fallback]
    assert starved, "24 decoder tokens cannot reach all 8 experts of both layers"
    notes = " ".join(calibration_notes(ternary))
    for layer in starved:
        assert all(f"{expert} ({layer.tokens[expert]} tokens)" in notes for expert in layer.fallback)


def test_the_report_is_a_folder_to_look_at(variants, tmp_path):
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
