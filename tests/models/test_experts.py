"""Experts: grouped and capacity dispatch against the plain definition, dense layers, parameter names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from qmoe_jax import SwitchConfig
from qmoe_jax.models import SwitchTransformer
from qmoe_jax.models.attention import relative_position_bucket
from qmoe_jax.models.experts import capacity_mlp, grouped_mlp
from qmoe_jax.models.layers import Embedding

TINY = SwitchConfig(
    d_model=12, d_ff=20, d_kv=4, num_heads=2, num_encoder_layers=2, num_decoder_layers=2, num_experts=3,
    encoder_sparse_layers=(1,), decoder_sparse_layers=(0, 1), vocab_size=40,
)  # fmt: skip


def random_experts(tokens: int, num_experts: int = 5, matrices: int = 1):
    generator = np.random.default_rng(tokens)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)
    wide = tuple(draw(num_experts, 6, 10) for _ in range(matrices))
    expert = jnp.asarray(generator.integers(0, num_experts, tokens) ** 2 // num_experts)  # uneven loads
    return draw(tokens, 6), expert, wide, draw(num_experts, 10, 6)


def plainly(x, expert, wide, narrow):
    rows = []
    for row, e in zip(x, expert, strict=True):
        hidden = jax.nn.relu(row @ wide[0][e])
        for gate in wide[1:]:
            hidden = hidden * (row @ gate[e])
        rows.append(hidden @ narrow[e])
    return jnp.stack(rows)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("matrices", [1, 2])
def test_grouped_experts_equal_one_expert_per_token(tokens, matrices):
    x, expert, wide, narrow = random_experts(tokens, matrices=matrices)
    found = jax.jit(lambda *a: grouped_mlp(*a, jax.nn.relu))(x, expert, wide, narrow)
    np.testing.assert_allclose(found, plainly(x, expert, wide, narrow), rtol=1e-4, atol=1e-5)


def test_capacity_buffers_agree_where_all_fit():
    x, expert, wide, narrow = random_experts(40)
    found = capacity_mlp(x, expert, jnp.ones(40, bool), 40, wide, narrow, jax.nn.relu)
    np.testing.assert_allclose(found, grouped_mlp(x, expert, wide, narrow, jax.nn.relu), rtol=1e-4, atol=1e-5)


def test_capacity_buffers_leave_out_dropped_tokens():
    x, expert, wide, narrow = random_experts(40)
    kept = jnp.arange(40) % 3 > 0
    found = capacity_mlp(x, expert, kept, 40, wide, narrow, jax.nn.relu)
    assert (np.asarray(found)[~np.asarray(kept)] == 0).all()
    np.testing.assert_allclose(
        found[kept], grouped_mlp(x, expert, wide, narrow, jax.nn.relu)[kept], rtol=1e-4, atol=1e-5
    )


def parameter_shapes(config: SwitchConfig) -> dict[str, tuple[int, ...]]:
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    variables = jax.eval_shape(
        lambda e, d: SwitchTransformer(config).init(jax.random.key(0), e, d), tokens, tokens
    )
    params = nn.meta.unbox(variables["params"])
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}


@pytest.mark.parametrize("name", ["switch_base_tiny_f32", "switch_c_tiny_f32"])
def test_the_parameter_tree_equals_t5x(data, name):
    from qmoe_jax.checkpoints.open import open_dense

    reader = open_dense(data / "t5x" / name / "checkpoint_1000")
    assert parameter_shapes(reader.config) == {n: reader.shape(n) for n in reader.names()}


def test_gated_experts_have_two_input_matrices():
    shapes = parameter_shapes(dataclasses.replace(TINY, gated=True, activation="gelu"))
    assert shapes["encoder/layers_0/mlp/wi_1/kernel"] == (12, 20)
    assert shapes["decoder/layers_0/mlp/expert/wi_0/kernel"] == (3, 12, 20)
    assert "decoder/layers_0/mlp/expert/wi/kernel" not in shapes


@pytest.mark.parametrize("bidirectional", [True, False])
def test_position_buckets_begin_where_those_of_t5_do(bidirectional):
    first = {
        True: [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91],
        False: [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113],
    }[bidirectional]
    buckets = np.asarray(relative_position_bucket(-jnp.arange(2000), bidirectional))
    assert [int(np.argmax(buckets == b)) for b in range(len(first))] == first
    assert buckets.max() == len(first) - 1


def test_an_id_beyond_the_vocabulary_gives_nan():
    embedding = Embedding(vocab_size=40, features=4)
    rows, _ = embedding.init_with_output(jax.random.key(0), jnp.array([3, 40, 39]))
    np.testing.assert_array_equal(np.isnan(rows).all(axis=1), [False, True, False])
    assert np.isnan(rows).sum() == 4
