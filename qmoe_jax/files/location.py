"""Locations of checkpoints: local directories, and URLs that tensorstore's key-value drivers open."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import tensorstore as ts

from qmoe_jax.files.errors import CheckpointError

# Six tries over about 20 seconds; tensorstore's default goes on for a quarter of an hour when a host is down.
_RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}


@dataclasses.dataclass(frozen=True)
class Location:
    """A directory.

    Attributes:
        path: a `Path` if it is local, else the URL.
        store: reads keys relative to it.
        context: what tensorstore opens arrays with. One per checkpoint: tensorstore keeps an array's metadata
            in it, and would not notice that another checkpoint now lies at the same path.
    """

    path: Path | str
    store: ts.KvStore
    context: ts.Context

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Location:
        """Return the directory at a local path (`~` is the home) or URL (gs, s3, http, https, file).

        Nothing is read, so a local path need not exist.

        Raises:
            CheckpointError: no driver opens the URL.
        """
        text = os.fspath(path)
        context = ts.Context({f"{driver}_request_retries": _RETRIES for driver in ("http", "gcs", "s3")})
        if match := re.match(r"([a-z0-9+.-]+)://", text):
            url = text.rstrip("/") + "/"
            try:
                store = ts.KvStore.open(url, context=context).result()
            except ValueError as error:
                raise CheckpointError(
                    f"no driver opens {match[1]}:// URLs",
                    path=text,
                    expected="a local path, or gs://, s3://, http(s)://, file://",
                    found=first_line(error),
                ) from error
            return cls(Path(text[7:]) if match[1] == "file" else url.rstrip("/"), store, context)
        local = Path(text).expanduser()
        spec = {"driver": "file", "path": f"{os.path.abspath(local)}/"}
        return cls(local, ts.KvStore.open(spec, context=context).result(), context)

    def __truediv__(self, name: str) -> Location:
        """Return a directory below this one."""
        path = self.path / name if isinstance(self.path, Path) else f"{self.path}/{name}"
        return Location(path, self.store / f"{name}/", self.context)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self.path).rsplit("/", maxsplit=1)[-1]

    @property
    def parent(self) -> Location:
        """The directory above."""
        return Location.of(str(self.path).rsplit("/", maxsplit=1)[0] or "/")

    @property
    def spec(self) -> dict[str, Any]:
        """The `kvstore` member of a tensorstore spec for an array in this directory."""
        return self.store.spec().to_json()

    def read(self, key: str) -> bytes | None:
        """Return a whole file, or None if there is none. Raises `CheckpointError` if it cannot be read."""
        try:
            result = self.store.read(key).result()
        except (ValueError, OSError) as error:
            raise CheckpointError(
                "cannot be read", path=f"{self.path}/{key}", found=first_line(error)
            ) from error
        return result.value if result.state == "value" else None

    def directories(self) -> list[str]:
        """Return the names of the directories in this one; none where the driver cannot list (http)."""
        if isinstance(self.path, Path):
            entries = self.path.iterdir() if self.path.is_dir() else ()
            return sorted(entry.name for entry in entries if entry.is_dir())
        try:
            keys = self.store.list().result()
        except (NotImplementedError, ValueError):
            return []
        return sorted({key.decode().split("/")[0] for key in keys if b"/" in key})


def first_line(error: Exception) -> str:
    """Return the message of a tensorstore error, without the specs that it appends."""
    return re.split(r" \[\w+='", str(error))[0].splitlines()[0]
