"""Capacity rules and auxiliary losses."""

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.models import GroupCapacity, SequenceCapacity
from qmoe_jax.models.router import load_balancing_loss, router_z_loss, within_capacity


def test_without_a_rule_nothing_is_dropped():
    assert np.asarray(within_capacity(jnp.zeros((2, 50), jnp.int32), 4, None)).all()


def test_sequence_capacity_counts_each_sequence_alone():
    expert = jnp.array([[0, 0, 1, 0], [0, 1, 1, 1]])
    kept = within_capacity(expert, 2, SequenceCapacity(2))
    np.testing.assert_array_equal(kept, [[True, True, True, False], [True, True, True, False]])


@pytest.mark.parametrize(
    ("tokens", "experts", "rule", "size", "capacity"),
    [
        # one sequence of 512 tokens at evaluation, as the published models' settings give it
        (512, 8, GroupCapacity(2.0, 4, 8192), 64, 16),
        (512, 128, GroupCapacity(4.0, 2, 4096), 4, 2),
        (32 * 512, 8, GroupCapacity(1.25, 4, 8192), 2048, 320),
    ],
)
def test_group_capacity_follows_flaxformer(tokens, experts, rule, size, capacity):
    assert rule.group_size(tokens, experts) == size
    assert rule.per_expert(size, experts) == capacity


def test_group_capacity_drops_the_last_tokens():
    rule = GroupCapacity(factor=1.0, minimum=1)
    expert = jnp.zeros((1, 8), jnp.int32)  # two groups of 4, 2 experts: each group keeps 2
    kept = within_capacity(expert, 2, rule)
    np.testing.assert_array_equal(kept, [[True, True, False, False, True, True, False, False]])


@pytest.mark.parametrize("name", ["switch_base_tiny_f32", "switch_c_tiny_f32"])
def test_auxiliary_losses_equal_flaxformer(data, name):
    golden = np.load(data / "t5x" / name / "io.npz")
    keys = [key for key in golden.files if key.endswith("router_logits")]
    assert len(keys) >= 4
    for key in keys:
        layer = key.removesuffix(".router_logits")
        logits = jnp.asarray(golden[key]).reshape(8, -1, 8)
        expected = golden[f"metric.{layer}.mlp.auxiliary_loss"], golden[f"metric.{layer}.mlp.router_z_loss"]
        found = load_balancing_loss(logits), router_z_loss(logits)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
