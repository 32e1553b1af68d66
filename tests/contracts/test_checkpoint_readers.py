"""The contract of every checkpoint layout, one row per layout."""

import collections
import hashlib
import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import serialization

from qmoe_jax.artifact import open_checkpoint
from qmoe_jax.checkpoints import Checkpoint, CheckpointError, open_dense
from qmoe_jax.config import SwitchConfig
from tests.helpers.checkpoint_samples import (
    DATA,
    EXPERTS,
    LAYOUTS,
    TINY,
    TINY_GATED,
    TINY_TIED,
    add_strays,
    random_parameters,
)

CONFIGS = {"untied": TINY, "tied": TINY_TIED, "gated": TINY_GATED}
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("layout") / "model"
    return open_dense(LAYOUTS[request.param](path, TINY, random_parameters()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_checkpoint_reads_back_every_bit(layout: str, config: SwitchConfig, tmp_path: Path) -> None:
    parameters = random_parameters(config)
    checkpoint = open_dense(LAYOUTS[layout](tmp_path / "model", config, parameters))
    assert checkpoint.config == config
    assert checkpoint.names() == sorted(parameters)
    for name, array in parameters.items():
        got = checkpoint.read(name)
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (array.shape, array.dtype)
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        assert got.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_keeps_float32(layout: str, tmp_path: Path) -> None:
    parameters = random_parameters(dtype=FLOAT32)
    checkpoint = open_dense(LAYOUTS[layout](tmp_path / "model", TINY, parameters))
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {FLOAT32}
    assert checkpoint.read(EXPERTS).tobytes() == parameters[EXPERTS].tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_path_may_have_any_name_and_strays_at_any_depth(layout: str, tmp_path: Path) -> None:
    parameters = random_parameters()
    # tensorstore's and Orbax's writers want UTF-8, so the checkpoint is moved.
    folder, moved = tmp_path / "written", tmp_path / "50% #1? a:b\nmod\udce9le"
    folder.mkdir()
    written = LAYOUTS[layout](folder / "model", TINY, parameters)
    folder.rename(moved)
    add_strays(moved)
    checkpoint = open_dense(moved / written.relative_to(folder))
    assert checkpoint.names() == sorted(parameters)
    assert checkpoint.read(EXPERTS).tobytes() == parameters[EXPERTS].tobytes()


def test_a_range_of_experts_is_that_range_of_the_whole_kernel(checkpoint: Checkpoint) -> None:
    whole = checkpoint.read(EXPERTS)
    for start, stop in itertools.product((0, 2, 4, None, -2), (1, 3, 5, 9, None)):
        part = slice(start, stop)
        np.testing.assert_array_equal(checkpoint.read(EXPERTS, part), whole[part])


def test_an_array_that_was_read_belongs_to_the_caller(checkpoint: Checkpoint) -> None:
    for name in (EXPERTS, "encoder/encoder_norm/scale", "decoder/relpos_bias/rel_embedding"):
        before = checkpoint.read(name)
        checkpoint.read(name)[:] = 0
        np.testing.assert_array_equal(checkpoint.read(name), before)


def test_unknown_parameters_and_impossible_ranges_are_refused(checkpoint: Checkpoint) -> None:
    for use in (checkpoint.read, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(CheckpointError, match="encoder/layers_9/nothing"):
            use("encoder/layers_9/nothing")
    with pytest.raises(ValueError, match="no expert axis"):
        checkpoint.read("encoder/encoder_norm/scale", experts=slice(0, 1))
    with pytest.raises(ValueError, match="step"):
        checkpoint.read(EXPERTS, experts=slice(0, 4, 2))


def test_a_checkpoint_lists_its_files(checkpoint: Checkpoint) -> None:
    shards = checkpoint.shards()
    assert not any(shard.problem for shard in shards)
    stored = sum(
        np.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize for name in checkpoint.names()
    )
    assert sum(shard.nbytes or 0 for shard in shards) > 0.5 * stored  # gzip and zstd take a part off


@pytest.mark.parametrize("layout", [*LAYOUTS, "upstream"])
def test_opening_a_checkpoint_decodes_each_index_once(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where Flax's msgpack, JSON (safetensors headers too) and torch's archives are decoded."""
    path = tmp_path / "model"
    path = (
        LAYOUTS[layout](path, TINY, random_parameters())
        if layout in LAYOUTS
        else DATA / "upstream_ckpt_tiny_a"
    )
    decoded: collections.Counter[str] = collections.Counter()

    def count(module: object, name: str, key: Callable[[object], str]) -> None:
        original = getattr(module, name)
        wrapped = lambda data, *args: (decoded.update([key(data)]), original(data, *args))[1]
        monkeypatch.setattr(module, name, wrapped)

    digest = lambda data: hashlib.sha256(data if isinstance(data, bytes) else str(data).encode()).hexdigest()
    count(serialization, "msgpack_restore", digest)
    count(json, "loads", lambda data: "a .zarray" if b"zarr_format" in bytes(data) else digest(data))
    count(zipfile, "ZipFile", str)
    open_checkpoint(path)
    arrays = decoded.pop("a .zarray", 0)
    assert arrays <= len(random_parameters())
    assert decoded or arrays
    assert set(decoded.values()) <= {1}


def test_an_opened_checkpoint_is_passed_through(checkpoint: Checkpoint) -> None:
    assert open_checkpoint(checkpoint) is checkpoint
