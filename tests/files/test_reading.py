"""Reads that return all that was asked for, or an error that names the file."""

from pathlib import Path

import numpy as np
import pytest

from qmoe_jax.files import reading
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.store import File


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    return path


def test_a_range_is_read_exactly_and_cannot_be_written(file: Path) -> None:
    data = File.at(file).read_exactly(10, 5)
    assert bytes(data) == bytes(range(10, 15))
    assert data.readonly


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_pieces_are_filled_in_order_however_many_go_into_a_call(
    file: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MAX_PIECES", at_once)
    pieces = [np.zeros(size, np.uint8) for size in (3, 0, 40, 1, 20)]
    reading.read_into(file, 7, [piece.data for piece in pieces])
    assert np.concatenate(pieces).tobytes() == bytes(range(7, 71))


def test_a_file_that_ends_within_the_range_is_cut_short(file: Path) -> None:
    with pytest.raises(CheckpointError, match="is cut short") as caught:
        File.at(file).read_exactly(90, 20)
    assert (caught.value.path, caught.value.expected) == (str(file), "at least 110 bytes")
    assert caught.value.found == "100 bytes"


@pytest.mark.parametrize(("size", "message"), [(99, "is too long"), (101, "is cut short")])
def test_a_file_of_another_size_than_expected_is_refused(file: Path, size: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        reading.read_into(file, 0, [np.zeros(1, np.uint8).data], file_size=size)


def test_a_missing_file_and_a_folder_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            File.at(path).read_exactly(0, 1)
