"""qmoe compare: the figures of the API as JSON and as tables."""

import pytest

import qmoe_jax as qj
from qmoe_jax.data import Tokenizer, samples
from tests.helpers.cli_runs import answer, qmoe


def test_compare_gives_the_figures_of_the_api_on_the_same_samples(model, artifact, texts):
    arguments = ("compare", model, artifact, "--text", texts, "--samples", 8)
    found = answer(*arguments)
    expected = qj.compare(model, artifact, samples(texts, Tokenizer(model), 8)).to_json()
    assert found["formats"] == ["huggingface", "qmoe"]
    assert found["weight_errors"] == expected["weight_errors"]
    assert found["layers"] == list(expected["layers"])
    assert found["compressed_loss"] == pytest.approx(expected["compressed_loss"], rel=1e-6)
    shown = qmoe(*arguments).stdout
    assert f"{expected['compressed_loss']:.4f}" in shown
    assert f"{found['layers'][1]['router_agreement']:.2%}" in shown
    wi = [error for name, error in found["weight_errors"].items() if name.endswith("/expert/wi/kernel")]
    assert f"{max(wi):.4g}" in shown
    assert "encoder/layers_*/mlp/expert/wi/kernel" in shown


def test_compare_finds_the_tokenizer_of_either_model(data, artifact, texts):
    found = answer("compare", data / "hf_tiny_a", artifact, "--text", texts, "--samples", 8)
    assert found["examples"] == 8


def test_compare_refuses_models_of_two_architectures(model, data, texts):
    result = qmoe("compare", model, data / "hf_tiny_fullsparse", "--text", texts, "--samples", 8)
    assert result.exit_code == 1
    assert "the two are not one model" in result.stderr
    assert "Traceback" not in result.stderr
