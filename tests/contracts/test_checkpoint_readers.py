"""What every checkpoint layout must do, a row each."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from qmoe_jax.checkpoints import Checkpoint, CheckpointError, open_dense
from qmoe_jax.config import SwitchConfig
from tests.helpers.checkpoint_samples import EXPERTS, LAYOUTS, TINY, TINY_GATED, TINY_TIED, random_parameters

CONFIGS = {"untied": TINY, "tied": TINY_TIED, "gated": TINY_GATED}
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module", params=LAYOUTS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("layout") / "model"
    return open_dense(LAYOUTS[request.param](path, TINY, random_parameters()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_reads_back_every_bit(layout: str, config: SwitchConfig, tmp_path: Path) -> None:
    parameters = random_parameters(config)
    reader = open_dense(LAYOUTS[layout](tmp_path / "model", config, parameters))
    assert isinstance(reader, Checkpoint)
    assert reader.config == config
    assert reader.names() == sorted(parameters)
    for name, array in parameters.items():
        got = reader.read(name)
        assert (reader.shape(name), reader.dtype(name)) == (array.shape, array.dtype)
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        assert got.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_float32(layout: str, tmp_path: Path) -> None:
    parameters = random_parameters(dtype=FLOAT32)
    reader = open_dense(LAYOUTS[layout](tmp_path / "model", TINY, parameters))
    assert {reader.dtype(name) for name in reader.names()} == {FLOAT32}
    assert reader.read(EXPERTS).tobytes() == parameters[EXPERTS].tobytes()


def test_a_range_of_experts_is_that_range_of_the_whole(reader: Checkpoint) -> None:
    whole = reader.read(EXPERTS)
    for start, stop in itertools.product((0, 2, 4, None, -2), (1, 3, 5, 9, None)):
        part = slice(start, stop)
        np.testing.assert_array_equal(reader.read(EXPERTS, part), whole[part])


def test_what_is_read_belongs_to_the_caller(reader: Checkpoint) -> None:
    for name in (EXPERTS, "encoder/encoder_norm/scale", "decoder/relpos_bias/rel_embedding"):
        before = reader.read(name)
        reader.read(name)[:] = 0
        np.testing.assert_array_equal(reader.read(name), before)


def test_refuses_what_is_not_there(reader: Checkpoint) -> None:
    for use in (reader.read, reader.shape, reader.dtype):
        with pytest.raises(CheckpointError, match="encoder/layers_9/nothing"):
            use("encoder/layers_9/nothing")
    with pytest.raises(ValueError, match="no expert axis"):
        reader.read("encoder/encoder_norm/scale", experts=slice(0, 1))
    with pytest.raises(ValueError, match="step"):
        reader.read(EXPERTS, experts=slice(0, 4, 2))


def test_lists_its_files(reader: Checkpoint) -> None:
    shards = reader.shards()
    assert not any(shard.problem for shard in shards)
    stored = sum(np.prod(reader.shape(name)) * reader.dtype(name).itemsize for name in reader.names())
    assert sum(shard.nbytes or 0 for shard in shards) > 0.5 * stored  # gzip and zstd take a part off
