"""Parameters that are kept are written once in a run, however often it is resumed."""

import dataclasses
import pathlib

import numpy as np
import pytest

from qmoe_jax.artifact.dense import dense_tensor
from qmoe_jax.compression.finished import FOLDER
from qmoe_jax.compression.kept import write_kept
from qmoe_jax.files.tensor import LazyTensor, read_all
from tests.helpers import artifact_samples as samples
from tests.helpers.checkpoint_samples import EXPERTS, TINY, memory_checkpoint, random_parameters

RECORD = f"{FOLDER}/dense.json"


@pytest.fixture
def recorded(tmp_path: pathlib.Path):
    """Write what is kept, in a process of its own as it were; return what was read for it."""
    parameters = random_parameters()
    checkpoint = memory_checkpoint(TINY, parameters)
    (tmp_path / "scratch").mkdir()

    def write() -> list[str]:
        found: list[str] = []
        counted: list[int] = []

        def spied(name: str) -> LazyTensor:
            def read(rows: slice) -> np.ndarray:
                found.append(name)
                return checkpoint.tensors[name].read(rows)

            return LazyTensor(checkpoint.shape(name), checkpoint.dtype(name), read)

        reader = dataclasses.replace(checkpoint, tensors={name: spied(name) for name in parameters})
        with samples.writer(tmp_path / "model") as writer:
            write_kept(writer, reader, list(parameters), tmp_path / "scratch", counted.append)
            assert sum(counted) == sum(parameters[name].nbytes for name in found)
            for name, record in writer._dense.items():
                stored = read_all(dense_tensor(writer.store, name, record))
                assert stored.tobytes() == parameters[name].tobytes()
        return found

    return write


def test_a_resumed_run_does_not_write_them_again(recorded, tmp_path: pathlib.Path) -> None:
    assert sorted(recorded()) == sorted(random_parameters())
    assert EXPERTS in random_parameters()  # of a stack that is skipped
    assert recorded() == []


@pytest.mark.parametrize("lost", [f"model/{RECORD}", "model/dense/_METADATA"])
def test_what_is_lost_is_written_again(recorded, tmp_path: pathlib.Path, lost: str) -> None:
    recorded()
    (tmp_path / lost).unlink()
    assert sorted(recorded()) == sorted(random_parameters())


def test_a_damaged_record_counts_as_none(recorded, tmp_path: pathlib.Path) -> None:
    recorded()
    record = tmp_path / "model" / RECORD
    record.write_bytes(record.read_bytes().replace(b"float", b"fl0at", 1).replace(b"bfl", b"Bfl"))
    assert sorted(recorded()) == sorted(random_parameters())
