"""Logits and router choices against Hugging Face and flaxformer, on models those programs wrote."""

import functools

import jax
import numpy as np
import pytest
from helpers.choices import assert_same_choices

from qmoe_jax.checkpoints.open import open_dense
from qmoe_jax.checkpoints.params import read_params
from qmoe_jax.models import SequenceCapacity, SwitchTransformer

TOLERANCE = 2e-4  # random models amplify rounding: thread count alone moves logits by 2e-5
DROPPING_TOLERANCE = 5e-4  # as the golden data's own check found


@functools.cache
def load(path):
    reader = open_dense(path)
    return reader.config, read_params(reader)


def apply_and_look_inside(config):
    """The model, compiled, with its router logits beside its own."""
    return jax.jit(functools.partial(SwitchTransformer(config).apply, mutable=["intermediates"]))


def hugging_face_inputs(golden, key):
    mask = golden[f"{key}.attention_mask"] > 0 if f"{key}.attention_mask" in golden.files else None
    encoder = golden[f"{key}.input_ids"]
    return encoder, golden[f"{key}.decoder_input_ids"], np.ones(encoder.shape, bool) if mask is None else mask


@pytest.mark.parametrize("name", ["hf_tiny_a", "hf_tiny_fullsparse"])
@pytest.mark.parametrize("key", ["in0", "in1", "in2", "pad0"])
def test_hugging_face_logits(data, relative, name, key):
    golden = np.load(data / name / "refs_transformers_5.23.0.npz")
    config, params = load(data / name)
    encoder, decoder, mask = hugging_face_inputs(golden, key)
    logits = jax.jit(SwitchTransformer(config).apply)({"params": params}, encoder, decoder, mask)
    real = np.ones(decoder.shape, bool)
    assert relative(logits[real], golden[f"{key}.logits"][real]) <= TOLERANCE


@pytest.mark.parametrize("key", ["in0", "pad0"])
def test_router_choices_are_hugging_faces(data, key):
    golden = np.load(data / "hf_tiny_a" / "refs_transformers_5.23.0.npz")
    config, params = load(data / "hf_tiny_a")
    encoder, decoder, mask = hugging_face_inputs(golden, key)
    _, state = apply_and_look_inside(config)({"params": params}, encoder, decoder, mask)
    compared = 0
    for stack in ("encoder", "decoder"):
        for layer in config.sparse_layers(stack):
            logits = state["intermediates"][stack][f"layers_{layer}"]["mlp"]["router"]["router_logits"][0]
            expected = golden[f"{key}.router.{stack}.block.{layer}.expert"]
            real = mask if stack == "encoder" else np.ones(decoder.shape, bool)
            compared += real.sum()
            if not assert_same_choices(logits, expected, real):
                return  # the layers behind got other states
    assert compared > 20


@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize("key", ["in0", "in1", "in2"])
@pytest.mark.parametrize(("version", "dropped"), [("5.23.0", "zero"), ("4.28.0", "input")])
def test_hugging_face_drops_tokens_beyond_capacity(data, relative, tokens, key, version, dropped):
    inputs = np.load(data / "hf_tiny_a" / "refs_transformers_5.23.0.npz")
    golden = np.load(data / "hf_tiny_a" / f"refs_transformers_{version}.npz")
    config, params = load(data / "hf_tiny_a")
    encoder, decoder, mask = hugging_face_inputs(inputs, f"cap{tokens}_{key}")
    model = SwitchTransformer(config, SequenceCapacity(tokens, dropped))
    logits = jax.jit(model.apply)({"params": params}, encoder, decoder, mask)
    assert relative(logits, golden[f"cap{tokens}_{key}.logits"]) <= DROPPING_TOLERANCE


@pytest.mark.parametrize("name", ["switch_base_tiny_f32", "switch_c_tiny_f32"])
def test_flaxformer_logits(data, relative, name):
    golden = np.load(data / "t5x" / name / "io.npz")
    config, params = load(data / "t5x" / name / "checkpoint_1000")
    logits, state = apply_and_look_inside(config)(
        {"params": params}, golden["encoder_input_tokens"], golden["decoder_input_tokens"]
    )
    real = (
        golden["decoder_target_tokens"] > 0
    )  # flaxformer masks by targets: elsewhere its logits have no meaning
    assert relative(logits[real], golden["logits"][real]) <= TOLERANCE
    layer = config.encoder_sparse_layers[0]
    routed = state["intermediates"]["encoder"][f"layers_{layer}"]["mlp"]["router"]["router_logits"][0]
    seen = golden["encoder_input_tokens"] > 0
    expected = golden[f"encoder.layers_{layer}.expert_index"].reshape(seen.shape)
    assert_same_choices(routed, expected, seen)
