"""A small compressed model that the tests of inference share."""

import numpy as np
import pytest

import qmoe_jax as qj


@pytest.fixture(scope="session")
def artifact(data, tmp_path_factory):
    """(path, examples): 8 experts in four layers, ternary."""
    generator = np.random.default_rng(0)
    draw = lambda n: generator.integers(2, 480, n).astype(np.int32)
    examples = [(draw(20), np.append(0, draw(5)).astype(np.int32)) for _ in range(8)]
    path = tmp_path_factory.mktemp("load") / "model"
    qj.compress(data / "hf_tiny_a", path, examples, qj.CompressionConfig(sentinel_start=480))
    return path, examples
