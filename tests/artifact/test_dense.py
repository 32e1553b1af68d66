"""Dense parameters are streamed: written and read range by range, and restored by Orbax."""

import errno
import os
import pathlib
import resource
import weakref
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from qmoe_jax.artifact import CheckpointError, dense
from qmoe_jax.artifact.dense import dense_tensor, save_dense, stored_record
from qmoe_jax.files.local_store import LocalStore
from qmoe_jax.files.store import Store, open_store
from qmoe_jax.files.tensor import LazyTensor, Tensor, in_memory, read_all
from tests.helpers.stores import file_driver_store, memory_store

ROW = np.arange(6 * 50, dtype=np.float32).reshape(6, 50)
ARRAYS = {
    "bfloat16/kernel": ROW.astype(ml_dtypes.bfloat16),
    "float16": ROW.astype(np.float16) / 16,
    "float32/a/kernel": ROW,
    "float64": ROW.astype(np.float64),
    "zeros": np.zeros((3, 4), np.float32),
    "int32": ROW.astype(np.int32),
    "bool": ROW > 100,
    "scalar": np.array(2.5, np.float32),
    "cube": np.arange(7 * 5 * 3, dtype=np.float32).reshape(7, 5, 3),
}


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: in_memory(array) for name, array in arrays.items()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges and chunks of a few rows, so that every array is written in several."""
    monkeypatch.setattr(dense, "RANGE_BYTES", 800)
    monkeypatch.setattr(dense, "CHUNK_BYTES", 350)


@pytest.fixture(params=["local", "memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_url") + "/dense")
    makers: dict[str, Callable[[], Store]] = {
        "local": lambda: LocalStore(tmp_path),
        "memory": memory_store,
        "file": lambda: file_driver_store(tmp_path),
    }
    return makers[request.param]()


@pytest.mark.usefixtures("small")
def test_arrays_are_read_as_they_were_written(store: Store) -> None:
    arrays = {**ARRAYS, "empty": np.zeros((0, 5), np.float32), "flat": np.zeros((5, 0), np.int8)}
    records = save_dense(store, tensors(arrays))
    assert list(records) == list(arrays)
    for name, array in arrays.items():
        found = read_all(dense_tensor(store, name, records[name]))
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert stored_record(store, name, records[name]) == records[name]
    part = dense_tensor(store, "float32/a/kernel", records["float32/a/kernel"]).read(slice(3, 5))
    assert part.tobytes() == ROW[3:5].tobytes()


def test_many_arrays_are_few_files_and_little_more_than_their_content(tmp_path: pathlib.Path) -> None:
    random = np.random.default_rng(0)
    arrays = {f"layers_{i}/kernel": random.standard_normal((64, 64), np.float32) for i in range(40)}
    save_dense(LocalStore(tmp_path), tensors(arrays))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) < 10
    assert sum(path.stat().st_size for path in files) < 1.05 * sum(a.nbytes for a in arrays.values())


@pytest.mark.usefixtures("small")
def test_records_do_not_depend_on_ranges(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = save_dense(LocalStore(tmp_path), tensors(ARRAYS))
    monkeypatch.undo()
    assert save_dense(LocalStore(tmp_path), tensors(ARRAYS)) == records


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("restored", ["standard", "pytree"])
def test_orbax_restores_them(tmp_path: pathlib.Path, restored: str) -> None:
    save_dense(LocalStore(tmp_path), tensors(ARRAYS))
    if restored == "standard":
        tree = traverse_util.unflatten_dict(ARRAYS, sep="/")
        target = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), tree)
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(tmp_path / "dense", target)
    else:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(tmp_path / "dense")
    flat = traverse_util.flatten_dict(found, sep="/")
    assert flat.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.asarray(flat[name]).dtype == array.dtype
        assert np.asarray(flat[name]).tobytes() == array.tobytes()


def test_two_ranges_are_held_at_a_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read in order and once; what was read before the last two ranges is given back."""
    monkeypatch.setattr(dense, "RANGE_BYTES", 1 << 16)
    monkeypatch.setattr(dense, "CHUNK_BYTES", 1 << 14)
    content = np.arange(1 << 17, dtype=np.float32).reshape(128, 1024)
    live: set[int] = set()
    held, rows_read = [], []

    def read(rows: slice) -> np.ndarray:
        rows_read.append((rows.start, rows.stop))
        array = content[rows].copy()
        live.add(id(array))
        weakref.finalize(array, live.discard, id(array))
        held.append(len(live) * array.nbytes)
        return array

    save_dense(LocalStore(tmp_path), {"a": LazyTensor(content.shape, content.dtype, read)})
    assert rows_read == [(start, start + 16) for start in range(0, 128, 16)]
    assert max(held) <= 2 * (1 << 16)  # the one that is written, and the one that is read


@pytest.mark.parametrize(
    ("name", "shape", "where"),
    [
        ("a/kernel", (64, 100), r"a/kernel, element \[47, 3\]"),
        ("encoder/layers_1/mlp/expert/wi/kernel", (64, 10, 10), r"expert 47, element \[0, 3\]"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_number_that_is_not_finite_is_named_and_nothing_is_left(
    tmp_path: pathlib.Path, name: str, shape: tuple[int, ...], where: str
) -> None:
    content = np.ones(shape, np.float32)
    content.reshape(64, 100)[47, 3] = np.inf
    with pytest.raises(CheckpointError, match=where) as caught:
        save_dense(LocalStore(tmp_path), {"b": in_memory(ROW), name: in_memory(content)}, source="model")
    assert caught.value.path == "model"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_what_is_there_stays_until_the_new_is_whole(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)
    records = save_dense(store, tensors(ARRAYS))

    def damaged(rows: slice) -> np.ndarray:
        raise CheckpointError("is damaged", path="model")

    with pytest.raises(CheckpointError, match="is damaged"):
        save_dense(store, {"a": in_memory(ROW), "b": LazyTensor((4, 4), np.dtype(np.float32), damaged)})
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert stored_record(store, "cube", records["cube"]) == records["cube"]
    records = save_dense(store, {"a": in_memory(ROW)})
    assert stored_record(store, "a", records["a"]) == records["a"]


def test_an_object_store_has_no_checkpoint_before_it_is_whole() -> None:
    store = memory_store()
    save_dense(store, {"a": in_memory(ROW)})
    broken = {"b": in_memory(np.array([np.nan], np.float32))}
    with pytest.raises(CheckpointError, match="not finite"):
        save_dense(store, broken)
    assert not store.exists("dense/_METADATA")


@pytest.mark.usefixtures("small")
def test_a_disk_that_is_full_while_arrays_are_written_is_told_and_freed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "require_room", lambda *_, **__: None)
    content = np.random.default_rng(0).standard_normal((6, 50), np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(CheckpointError, match=r"dense: the dense parameters cannot be written") as caught:
            save_dense(LocalStore(tmp_path), {"a": in_memory(content)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert not list(tmp_path.iterdir())
