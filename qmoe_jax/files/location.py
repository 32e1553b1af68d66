"""Locations of checkpoints: local directories, and URLs that tensorstore's key-value drivers open."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorstore as ts

from qmoe_jax.files.errors import CheckpointError, printable

# Six tries over about 20 seconds; tensorstore's default goes on for a quarter of an hour when a host is down.
_RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}


_REFUSED = "check the credentials, and that they may read, write, list and delete there"
_UNREACHABLE = "check the network and the address of the server, then run the same command again"

# Statuses of tensorstore with which a server or the system does not give out what may be there.
_WITHHELD = {
    "PERMISSION_DENIED": _REFUSED,
    "UNAUTHENTICATED": _REFUSED,
    "UNAVAILABLE": _UNREACHABLE,
    "DEADLINE_EXCEEDED": _UNREACHABLE,
    "ABORTED": _UNREACHABLE,
    "RESOURCE_EXHAUSTED": "the server limits requests: run the same command again later",
}
_REMEDIES = {
    **_WITHHELD,
    "NoSuchBucket": "make the bucket, or correct its name",
    "UNIMPLEMENTED": "choose a location that can be written and listed, such as gs:// or s3://",
}
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


class Unreadable(CheckpointError):
    """A file that a server or the system does not give out: it may be there and whole."""


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

        Nothing is read, so a local path need not exist. Credentials are found as the driver finds them; for
        s3, `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` names another server than Amazon's.

        Raises:
            CheckpointError: no driver opens the URL, or it is a file URL that `local_path` refuses.
        """
        context = _context(os.environ)
        if (local := local_path(path)) is None:
            text = os.fspath(path)
            match = _URL.match(text)
            assert match is not None
            url = match[0].lower() + text[match.end() :].rstrip("/") + "/"
            try:
                spec: str | dict[str, Any] = url
                if url.startswith("s3:"):
                    spec = {**ts.KvStore.Spec(url).to_json(), **_s3_endpoint(os.environ)}
                store = ts.KvStore.open(spec, context=context).result()
            except ValueError as error:
                raise CheckpointError(
                    f"no driver opens {match[1]}:// URLs",
                    path=text,
                    expected="a local path, or gs://, s3://, http(s)://, file://",
                    found=first_line(error),
                ) from error
            return cls(url.rstrip("/"), store, context)
        spec = {"driver": "file", "path": os.path.join(tensorstore_path(local), "")}
        return cls(local, ts.KvStore.open(spec, context=context).result(), context)

    def __truediv__(self, name: str) -> Location:
        """Return a directory below this one."""
        if isinstance(self.path, Path) and printable(name) != name:
            return dataclasses.replace(Location.of(self.path / name), context=self.context)
        path = self.path / name if isinstance(self.path, Path) else f"{self.path}/{name}"
        return Location(path, self.store / f"{name}/", self.context)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self.path).rsplit("/", maxsplit=1)[-1]

    @property
    def parent(self) -> Location:
        """The directory above."""
        if isinstance(self.path, Path):
            return Location.of(self.path.absolute().parent if self.path == Path() else self.path.parent)
        return Location.of(self.path.rsplit("/", maxsplit=1)[0])

    @property
    def spec(self) -> dict[str, Any]:
        """The `kvstore` member of a tensorstore spec for an array in this directory."""
        return self.store.spec().to_json()

    def read(self, key: str) -> bytes | None:
        """Return a whole file, or None if there is none. Raises `CheckpointError` if it cannot be read."""
        try:
            result = self.store.read(key).result()
        except (ValueError, OSError) as error:
            raise driver_error("cannot be read", f"{self.path}/{key}", error) from error
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


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """Return the local path that a path or a file URL means; None for another URL.

    `~` is the home in a path, and itself in a URL. A URL is `file:///path`, `file://localhost/path` or
    `file:/path`, percent-encoded; `+` is a plus sign. What exists under the name as it is given is a path.

    Raises:
        CheckpointError: a file URL names another host, is relative, or has a query or a fragment.
    """
    text = os.fsdecode(path)
    if not re.match(r"file:", text, re.IGNORECASE) or (not _URL.match(text) and os.path.lexists(text)):
        return None if _URL.match(text) else Path(text).expanduser()
    parts = urllib.parse.urlsplit(text)
    decoded = os.fsdecode(urllib.parse.unquote_to_bytes(parts.path))
    problem = None
    if parts.netloc.lower() not in ("", "localhost"):
        problem = "is a file URL of another host"
    elif "?" in text or "#" in text:
        problem = "is a file URL with a query or a fragment"
    elif not decoded.startswith("/"):
        problem = "is a relative file URL"
    elif "\0" in decoded:
        problem = "is a file URL with a NUL in its path"
    if problem:
        raise CheckpointError(
            problem,
            path=text,
            expected="file:///path with the path percent-encoded (? as %3F, # as %23)",
            remedy="pass the path itself",
        )
    return Path(decoded)


def tensorstore_path(directory: str | os.PathLike[str]) -> str:
    """Return the absolute path by which tensorstore, whose paths are UTF-8, opens a directory.

    A path that is not UTF-8 is opened through a file descriptor of the nearest directory that exists, which
    stays open. Below that nothing can be read, so names that are not UTF-8 are replaced.
    """
    path = os.path.abspath(directory)
    try:
        path.encode()
    except UnicodeEncodeError:
        nearest = path
        while not os.path.isdir(nearest):
            nearest = os.path.dirname(nearest)
        found = os.stat(nearest)
        below = printable(path[len(nearest) :])
        return f"/proc/self/fd/{_descriptor(nearest, found.st_dev, found.st_ino)}{below}"
    return path


@functools.cache
def _descriptor(path: str, device: int, inode: int) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _context(environment: Mapping[str, str]) -> ts.Context:
    """Return what the drivers share: how often they try again, and where the credentials for s3 are."""
    resources: dict[str, Any] = {f"{name}_request_retries": _RETRIES for name in ("http", "gcs", "s3")}
    if environment.get("AWS_ACCESS_KEY_ID"):  # by default tensorstore logs that there are no files of AWS's
        resources["aws_credentials"] = {"type": "environment"}
    return ts.Context(resources)


def _s3_endpoint(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the members of an s3 spec that AWS's programs take from these variables, and tensorstore not."""
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    # Without a region tensorstore asks the server for the bucket's.
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    found = {"endpoint": (endpoint or "").rstrip("/"), "aws_region": region if endpoint else None}
    return {name: value for name, value in found.items() if value}


def driver_error(problem: str, path: object, error: Exception, *, key: str | None = None) -> CheckpointError:
    """Return the error for what a driver of tensorstore could not do: its words, and a remedy if known."""
    text = str(error)
    kind = Unreadable if any(status in text for status in _WITHHELD) else CheckpointError
    remedy = next((remedy for status, remedy in _REMEDIES.items() if status in text), None)
    return kind(problem, path=path, key=key, found=first_line(error), remedy=remedy)


def first_line(error: Exception) -> str:
    """Return the message of a tensorstore error, without the specs that it appends."""
    return re.split(r" \[\w+='", str(error))[0].splitlines()[0]
