"""Configurations inferred from shapes, and the errors for shapes of no model."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.checkpoints import CheckpointError
from qmoe_jax.checkpoints.architecture import expected_shapes, infer_config
from qmoe_jax.config import PRESETS, SwitchConfig
from tests.helpers.checkpoint_samples import TINY, TINY_GATED

# Parameters of the published models, counted from their own files and papers.
PARAMETERS = {
    "switch-base-8": 619_339_008,
    "switch-base-16": 1_072_397_568,
    "switch-base-32": 1_978_514_688,
    "switch-base-64": 3_790_748_928,
    "switch-base-128": 7_415_217_408,
    "switch-base-256": 14_664_154_368,
    "switch-large-128": 26_309_291_008,
    "switch-xxl-128": 394_675_073_024,
    "switch-c-2048": 1_571_327_875_360,
}


@pytest.mark.parametrize("model", PRESETS)
def test_published_models_are_inferred_from_their_shapes(model: str) -> None:
    assert infer_config(expected_shapes(PRESETS[model]), "path") == PRESETS[model]


@pytest.mark.parametrize("model", PRESETS)
def test_published_models_have_the_published_number_of_parameters(model: str) -> None:
    assert sum(map(math.prod, expected_shapes(PRESETS[model]).values())) == PARAMETERS[model]


@st.composite
def configs(draw: st.DrawFn) -> SwitchConfig:
    sizes = st.integers(1, 9)
    layers = {stack: draw(st.integers(1, 4)) for stack in ("encoder", "decoder")}
    sparse = {s: tuple(i for i in range(n) if draw(st.booleans())) for s, n in layers.items()}
    gated = draw(st.booleans())
    return SwitchConfig(
        d_model=draw(sizes),
        d_ff=draw(sizes),
        d_kv=draw(sizes),
        num_heads=draw(sizes),
        num_encoder_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        num_experts=draw(sizes) if any(sparse.values()) else 0,
        encoder_sparse_layers=sparse["encoder"],
        decoder_sparse_layers=sparse["decoder"],
        vocab_size=draw(sizes),
        gated=gated,
        activation="gelu" if gated else "relu",
        tied=draw(st.booleans()),
        relative_attention_buckets=draw(sizes),
    )


@given(configs())
@settings(deadline=None, max_examples=50)
def test_any_architecture_is_inferred_from_its_shapes(config: SwitchConfig) -> None:
    assert infer_config(expected_shapes(config), "path") == config


@given(configs(), st.data())
@settings(deadline=None, max_examples=50)
def test_any_missing_or_misshapen_tensor_is_named(config: SwitchConfig, data: st.DataObject) -> None:
    shapes = expected_shapes(config)
    name = data.draw(st.sampled_from(sorted(shapes)))
    broken = {key: shape for key, shape in shapes.items() if key != name}
    try:
        # Without its head an untied model is a tied one, and so on.
        assert infer_config(broken, "path") != config
    except CheckpointError as error:
        assert error.path == "path"
    with pytest.raises(CheckpointError) as caught:
        infer_config({**shapes, name: (*shapes[name], 2)}, "path")
    assert caught.value.path == "path"
    assert caught.value.expected is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_embedder/embedding": None}, "token_embedder/embedding"),
        ({"encoder/relpos_bias/rel_embedding": None}, "encoder/relpos_bias/rel_embedding"),
        ({"encoder/layers_0/attention/query/kernel": (8, 7)}, "a multiple of 2 heads"),
        ({"decoder/layers_5/mlp/wi/kernel": (8, 12)}, "layers_0, layers_1, layers_5"),
        ({"encoder/layers_2/mlp/wo/kernel": (12, 9)}, r"expected: \(12, 8\)\n  found: \(12, 9\)"),
        ({"encoder/layers_1/mlp/expert/wo/kernel": (4, 12, 8)}, "encoder/layers_1/mlp/expert/wo/kernel"),
        (
            {"encoder/layers_1/mlp/expert/wo/bias": (5, 8)},
            "does not have\n  key: encoder/layers_1/mlp/expert/wo/bias",
        ),
        ({"decoder/decoder_norm/scale": None}, "missing\n  key: decoder/decoder_norm/scale"),
    ],
)
def test_the_error_names_the_tensor_that_does_not_fit(
    changes: dict[str, tuple[int, ...] | None], message: str
) -> None:
    shapes = {k: v for k, v in (expected_shapes(TINY) | changes).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        infer_config(shapes, "path")


def test_settings_that_no_shape_tells_are_taken_over() -> None:
    config = infer_config(expected_shapes(TINY_GATED), "path", layer_norm_epsilon=1e-3, eos_id=5)
    assert config == dataclasses.replace(TINY_GATED, layer_norm_epsilon=1e-3, eos_id=5)
