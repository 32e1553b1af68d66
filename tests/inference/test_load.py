"""Compressed models opened for packed inference."""

import jax
import numpy as np
import pytest

import qmoe_jax as qj
from pallas_kernels import PackedMatrix
from tests.helpers.choices import assert_same_generation


def packed_in(params) -> int:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, PackedMatrix))
    return sum(isinstance(leaf, PackedMatrix) for leaf in leaves)


def test_a_compressed_model_of_upstream_runs_packed(data, relative):
    model, params = qj.load_compressed(data / "upstream_ckpt_tiny_a")
    assert packed_in(params) == 8  # wi and wo of four sparse layers
    golden = np.load(data / "upstream_ckpt_tiny_a_refs.npz")
    key = next(k.split(".")[1] for k in golden.files if k.startswith("dense_f32.") and k.endswith(".logits"))
    inputs = (golden[f"dense_f32.{key}.{name}"] for name in ("input_ids", "decoder_input_ids"))
    logits = jax.jit(model.apply)({"params": params}, *inputs)
    assert relative(logits, golden[f"dense_f32.{key}.logits"]) <= 2e-4


def test_packed_logits_equal_dequantized_logits(artifact, relative):
    path, examples = artifact
    (model, params), (dense, dense_params) = qj.load_compressed(path), qj.load_model(path)
    assert (packed_in(params), packed_in(dense_params)) == (8, 0)
    encoder, decoder = examples[0][0][None], examples[0][1][None]
    packed_logits = jax.jit(model.apply)({"params": params}, encoder, decoder)
    dense_logits = jax.jit(dense.apply)({"params": dense_params}, encoder, decoder)
    assert relative(packed_logits, dense_logits) <= 1e-4


def test_one_packed_layer_equals_the_dequantized_layer(artifact, relative):
    from qmoe_jax.models.switch import EncoderBlock

    path, _ = artifact
    (model, params), (_, dense_params) = qj.load_compressed(path), qj.load_model(path)
    x = np.random.default_rng(1).standard_normal((2, 9, 64)).astype(np.float32)
    block = EncoderBlock(model.config, sparse=True)
    packed, dense = (
        block.apply({"params": p["encoder"]["layers_1"]}, x, method="feed_forward")
        for p in (params, dense_params)
    )
    assert relative(packed, dense) <= 1e-5


def test_packed_generation_equals_dequantized_generation(artifact):
    path, examples = artifact
    (model, params), (dense, dense_params) = qj.load_compressed(path), qj.load_model(path)
    tokens = np.stack([encoder for encoder, _ in examples[:3]])
    found = qj.generate(model, params, tokens, max_new_tokens=6)
    expected = qj.generate(dense, dense_params, tokens, max_new_tokens=6)
    assert_same_generation(dense, dense_params, tokens, found, expected)


def test_a_dense_checkpoint_is_refused_by_name(data):
    with pytest.raises(qj.CheckpointError, match="is not compressed"):
        qj.load_compressed(data / "hf_tiny_a")


def test_the_router_is_loaded_in_float32(data):
    _, params = qj.load_model(data / "hf_tiny_a", dtype="bfloat16")
    layer = params["encoder"]["layers_1"]["mlp"]
    assert layer["router"]["router_weights"]["w"]["kernel"].dtype == "float32"
    assert layer["expert"]["wi"]["kernel"].dtype == "bfloat16"
