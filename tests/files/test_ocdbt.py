"""The files that an OCDBT database needs, of which those of values alone are not read when it is opened."""

import os
from pathlib import Path

import pytest
import tensorstore as ts

from qmoe_jax.checkpoints import CheckpointError, open_dense
from qmoe_jax.files.location import Location
from qmoe_jax.files.ocdbt import data_files
from tests.helpers.checkpoint_samples import LAYOUTS, TINY, random_parameters


def write_database(path: Path, values: dict[str, bytes]) -> None:
    """Write one value at a time, each into a file of its own beside the tree's."""
    config = {"max_inline_value_bytes": 16}
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/", "config": config}).result()
    for key, value in values.items():
        store.write(key, value).result()


def test_the_files_of_values_and_of_the_tree_are_listed(tmp_path: Path) -> None:
    write_database(tmp_path, {f"key{i}": bytes(100 * i) for i in range(1, 4)})
    needed = data_files(Location.of(tmp_path))
    assert 2 <= len(needed) <= 4
    for name, size in needed.items():
        assert 0 < size <= (tmp_path / name).stat().st_size
    assert sum(needed.values()) >= 600


@pytest.mark.parametrize(("cut", "problem"), [(False, "missing"), (True, "cut short")])
def test_a_missing_or_cut_file_of_values_is_told_at_opening(cut: bool, problem: str, tmp_path: Path) -> None:
    """As in a large checkpoint, whose values lie in files apart from the tree, which alone does not tell."""
    path = LAYOUTS["orbax, ocdbt"](tmp_path / "model", TINY, random_parameters()) / "checkpoint_7/state"
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    before = set((path / "d").iterdir())
    store.write("another.array/0", bytes(5000)).result()
    (values,) = set((path / "d").iterdir()) - before
    store.write("another.array/1", bytes(5000)).result()  # the newest tree lies in another file now
    assert not [shard for shard in open_dense(path).shards() if shard.problem]
    os.truncate(values, 100) if cut else values.unlink()
    with pytest.raises(CheckpointError, match=rf"{values.name}: {problem}"):
        open_dense(path)
