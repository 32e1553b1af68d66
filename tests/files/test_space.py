"""Room on a disk is taken before work is put into it."""

import errno
import os
from pathlib import Path

import pytest

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.space import allocate, require_room


def fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EINVAL])
def test_an_allocated_file_has_its_size_and_its_blocks(
    tmp_path: Path, monkeypatch, number: int | None
) -> None:
    size = (1 << 20) + 4097
    if number is not None:  # a file system that cannot allocate: zeros are written
        fails(monkeypatch, number)
    with (tmp_path / "file").open("w+b") as file:
        allocate(file.fileno(), size)
        found = os.fstat(file.fileno())
    assert found.st_size == size
    assert found.st_blocks * 512 >= size


def test_there_is_room(tmp_path: Path) -> None:
    require_room(tmp_path, 12345, wanted="file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_what_was_to_be_written(tmp_path: Path, monkeypatch, number: int) -> None:
    fails(monkeypatch, number)
    with pytest.raises(
        CheckpointError,
        match=r"out/dense: cannot be written: not enough room(.|\n)*12,345 bytes(.|\n)*remedy: free",
    ):
        require_room(tmp_path, 12345, wanted="out/dense")


def test_a_limit_of_file_sizes_is_not_the_size_of_the_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1000, 1000))
    sizes: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, start, size: sizes.append(size))
    require_room(tmp_path, 2500, wanted="file")
    assert sizes == [1000, 1000, 500]


def test_more_than_the_disk_has_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not enough room(.|\n)*bytes free \([\d,]+ are\)"):
        require_room(tmp_path / "missing", 1 << 60, wanted="file")
