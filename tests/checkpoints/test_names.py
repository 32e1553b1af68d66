"""Hugging Face's names and T5X's: a bijection on every published model, and on names that torch gave."""

import pytest

from qmoe_jax.checkpoints.architecture import expected_shapes
from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.config import PRESETS
from qmoe_jax.files.safetensors import open_safetensors
from qmoe_jax.parameters import is_expert
from tests.helpers.checkpoint_samples import DATA

MODELS = ("hf_tiny_a", "hf_tiny_fullsparse")
# Tensors of a published model in Hugging Face's form, the embedding and its copies not counted.
HUGGINGFACE_COUNTS = {
    "switch-base-8": 436,
    "switch-base-16": 628,
    "switch-base-32": 1012,
    "switch-base-64": 1780,
    "switch-base-128": 3316,
    "switch-base-256": 6388,
    "switch-large-128": 6628,
    "switch-xxl-128": 9724,
    "switch-c-2048": 123_169,
}


@pytest.mark.parametrize("model", MODELS)
def test_every_name_that_transformers_wrote_is_known(model: str) -> None:
    for key in open_safetensors(DATA / model / "model.safetensors"):
        place = names.to_t5x(key)
        assert place is not None, key
        if key not in names.EMBEDDING_COPIES:
            assert names.to_huggingface(place.name, place.expert) == key


@pytest.mark.parametrize("model", PRESETS)
def test_there_and_back(model: str) -> None:
    for name in expected_shapes(PRESETS[model]):
        for expert in (0, 12) if is_expert(name) else (None,):
            assert names.to_t5x(names.to_huggingface(name, expert)) == names.Place(name, expert)


@pytest.mark.parametrize("model", PRESETS)
def test_models_have_the_published_number_of_tensors(model: str) -> None:
    shapes = expected_shapes(PRESETS[model])
    heads = {"token_embedder/embedding", "decoder/logits_dense/kernel"}
    count = sum(shape[0] if is_expert(name) else 1 for name, shape in shapes.items() if name not in heads)
    assert count == HUGGINGFACE_COUNTS[model]


def test_the_large_models_keep_the_head_under_the_decoder() -> None:
    assert names.to_t5x("decoder.lm_head.weight") == names.to_t5x("lm_head.weight")


@pytest.mark.parametrize(
    "key",
    [
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.0.layer.1.EncDecAttention.q.weight",
        "decoder.block.0.layer.1.mlp.wi.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight",
        "encoder.block.0.layer.1.mlp.experts.expert_0.wi.bias",
        "",
    ],
)
def test_others_have_no_place(key: str) -> None:
    assert names.to_t5x(key) is None
