"""A local directory as a store of files: durable writes, reads by `pread`, a lock."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qmoe_jax.files.durable import (
    FileRecord,
    make_folder,
    record_of,
    sync_folder,
    temporary_files,
    write_durably,
)
from qmoe_jax.files.errors import system_error
from qmoe_jax.files.location import tensorstore_path
from qmoe_jax.files.lock import Lock
from qmoe_jax.files.reading import read_into, read_whole, unreadable

_ABSENT = (FileNotFoundError, NotADirectoryError)


class LocalStore:
    """The directory `root`, which need not exist. See `store.Store`."""

    context = None
    exclusive = True
    can_list = True

    def __init__(self, root: Path):
        self.root: Path = root

    @property
    def spec(self) -> dict[str, Any]:
        """The `kvstore` member of a tensorstore spec."""
        return {"driver": "file", "path": os.path.join(tensorstore_path(self.root), "")}

    def path(self, name: str) -> Path:
        """Return where a file lies."""
        return self.root / name

    def entries(self) -> list[str]:
        """Return the names in the directory; none where it is missing."""
        try:
            return sorted(os.listdir(self.root))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise system_error("cannot be read", self.root, error) from error

    def names(self, folder: str = "") -> list[str]:
        """Return all files below a folder, links to files among them."""
        found = (path for path in (self.root / folder).rglob("*") if not path.is_dir())
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def exists(self, name: str) -> bool:
        """Return whether a file is there."""
        return self.size(name) is not None

    def size(self, name: str, expected: int | None = None) -> int | None:
        """Return the size of a file; None where there is none."""
        try:
            found = os.stat(self.root / name)
        except _ABSENT:
            return None
        except OSError as error:
            raise unreadable(self.root / name, error) from error
        return None if stat.S_ISDIR(found.st_mode) else found.st_size

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        return read_whole(self.root / name)

    def read_into(
        self,
        name: str,
        offset: int,
        pieces: Sequence[memoryview],
        *,
        file_size: int | None = None,
        key: str | None = None,
    ) -> None:
        """Fill pieces of memory as `reading.read_into` does: never mapped, the GIL free."""
        read_into(self.root / name, offset, pieces, file_size=file_size, key=key)

    def find_record(self, name: str) -> FileRecord | None:
        """Return the record of a file, read chunk by chunk; None where there is none."""
        return None if self.size(name) is None else record_of(self.root / name)

    def write(
        self,
        name: str,
        chunks: Iterable[bytes | memoryview],
        *,
        over: FileRecord | None = None,
        host: int = 0,
    ) -> FileRecord:
        """Write a file as `durable.write_durably` does; the lock, not `over`, keeps other writers out."""
        return write_durably(self.root / name, chunks, host=host)

    def delete(self, name: str) -> None:
        """Remove a file, durably."""
        path = self.root / name
        try:
            path.unlink()
        except _ABSENT:
            return
        except OSError as error:
            raise system_error("cannot be removed", path, error) from error
        sync_folder(path.parent)

    def delete_folder(self, folder: str) -> None:
        """Remove a folder with all that is in it; what cannot be removed stays."""
        shutil.rmtree(self.root / folder, ignore_errors=True)

    def lock(self, name: str) -> Callable[[], None]:
        """Make the directory and take its lock."""
        make_folder(self.root)
        return Lock(self.root / name).release

    def remove_temporary(self, host: int) -> None:
        """Remove the files that a killed writer of this host left half-written."""
        for path in temporary_files(self.root, host):
            path.unlink()
