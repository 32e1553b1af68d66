"""Files that are whole or absent."""

import errno
import os
import stat
from pathlib import Path

import pytest

from qmoe_jax.files.durable import (
    durable_file,
    record_of,
    record_of_pieces,
    sync_folder,
    temporary_files,
    write_durably,
)
from qmoe_jax.files.errors import CheckpointError


def test_a_written_file_has_its_record(tmp_path: Path) -> None:
    path, chunks = tmp_path / "new" / "folder" / "file", [b"some ", memoryview(b"bytes")]
    record = write_durably(path, chunks)
    assert path.read_bytes() == b"some bytes"
    assert record == record_of(path) == record_of_pieces(chunks)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_a_leftover_of_its_host(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), durable_file(path, host=3) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert (len(temporary_files(tmp_path, 3)), temporary_files(tmp_path, 0)) == (1, [])


def test_a_record_counts_every_byte_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10 << 20))
    assert record_of(tmp_path / "file") == record_of_pieces([bytes(10 << 20)])


def directories_cannot_be_synced(monkeypatch, number: int) -> None:
    def fsync(descriptor: int, *, real=os.fsync) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_directories_will_do(tmp_path: Path, monkeypatch, number: int) -> None:
    directories_cannot_be_synced(monkeypatch, number)
    write_durably(tmp_path / "new" / "file", [b"bytes"])
    assert (tmp_path / "new" / "file").read_bytes() == b"bytes"


def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch) -> None:
    directories_cannot_be_synced(monkeypatch, errno.EIO)
    with pytest.raises(CheckpointError, match=r"cannot be synced(.|\n)*remedy: check the disk"):
        sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_file_and_leaves_nothing_of_it(tmp_path: Path, number: int) -> None:
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match=rf"{path}: cannot be written(.|\n)*remedy"), durable_file(path):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []
