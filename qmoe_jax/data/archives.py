"""Compressed text: opened by its suffix, or by its first bytes where a stream has no name.

Suffix and first bytes must agree, so that no text is taken for an archive, nor an archive for text. Members
and frames that were concatenated are read as one.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, cast

from qmoe_jax.data.errors import TextError
from qmoe_jax.files.foreign import HEAD_BYTES, recognize

ZSTD_WINDOW_LOG = 31
"""Largest window of a zstd frame as a power of two, in bytes: what `zstd --long=31` writes."""

_CHUNK = 1 << 16  # bytes read together

INSTALL = "pip install 'qmoe-jax[data]'"


def zstd_module(path: object) -> Any:
    """Return the module that reads zstd: of the standard library, or its backport.

    Raises:
        TextError: neither is installed.
    """
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise TextError(
            "is compressed by zstd, and no library that reads it is installed",
            path=path,
            expected="backports.zstd, or text compressed as .gz, .bz2 or .xz",
            found=error,
            remedy=f"{INSTALL}, or decompress the file (zstd -d)",
        ) from error
    return zstd


def _zstd_decompressor(path: object) -> Any:
    zstd = zstd_module(path)
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})


OPENERS: dict[str, Callable[[BinaryIO, object], Any]] = {
    ".gz": lambda stream, _: gzip.GzipFile(fileobj=stream),
    ".bz2": lambda stream, _: _Members(stream, bz2.BZ2Decompressor),
    ".xz": lambda stream, _: _Members(stream, lzma.LZMADecompressor),
    ".zst": lambda stream, path: _Members(stream, lambda: _zstd_decompressor(path)),
}
"""Functions that open a compressed stream, by suffix."""

_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_ZSTD_SKIPPABLE = tuple(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16))


def compression_of(head: bytes) -> str | None:
    """Return the suffix of the compression whose data begins with `head`; None for other data."""
    if head.startswith(_ZSTD_SKIPPABLE):
        return ".zst"
    return next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), None)


@contextmanager
def decompressed(stream: BinaryIO, path: object, suffix: str | None) -> Iterator[IO[bytes]]:
    """Open a stream for reading, decompressed; memory is that of the decompressor.

    Errors of the decompressor become `TextError` within the context.

    Args:
        stream: the bytes as they are stored; it need not be seekable.
        path: its name, for messages.
        suffix: the compression that its name tells: a key of `OPENERS`, or empty for none; None: the first
            bytes tell.

    Raises:
        TextError: the first bytes are not those of the compression, or the data is damaged.
    """
    head = stream.read(HEAD_BYTES)
    found = compression_of(head)
    if suffix is not None and head and found != (suffix or None):
        raise _disagreement(path, suffix, found, head)
    whole = cast(BinaryIO, io.BufferedReader(_Rewound(head, stream)))
    known = None if found else recognize(head)
    if known and (known.remedy == "unpack it" or "pointer" in known.problem):
        raise TextError(known.problem, path=path, expected="text", remedy=known.remedy)
    if not head or found is None:
        yield whole
        return
    archive = io.BufferedReader(OPENERS[found](whole, path))
    with _damage_named(path, found):
        try:
            yield archive
        except TextError:  # is the text odd, or the archive damaged?
            while archive.read(_CHUNK):
                pass
            raise


@contextmanager
def _damage_named(path: object, suffix: str) -> Iterator[None]:
    zstd_error = (zstd_module(path).ZstdError,) if suffix == ".zst" else ()
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, *zstd_error) as error:
        raise _damage(path, suffix, error) from error
    except OSError as error:
        if error.errno is None:  # bzip2's complaint
            raise _damage(path, suffix, error) from error
        raise


def _damage(path: object, suffix: str, error: Exception) -> TextError:
    return TextError(
        f"is damaged {_NAMES[suffix]} data",
        path=path,
        expected=f"{_NAMES[suffix]} data, whole",
        found=f"{error}".rstrip("."),
        remedy="copy or download the file again",
    )


def _disagreement(path: object, suffix: str, found: str | None, head: bytes) -> TextError:
    """Return the error for a name that tells another compression than the bytes."""
    foreign = recognize(head)
    content = f"data compressed by {_NAMES[found]}" if found else f"bytes that begin with {head[:12]!r}"
    if found is None and foreign:
        content, remedy = foreign.problem.split(",")[0].removeprefix("is "), foreign.remedy
    elif found:
        remedy = f"let its name end in {found}, or decompress it"
    else:
        remedy = f"if it is text, take {suffix} from its name; else copy or download it again"
    expected = f"{_NAMES[suffix]} data, as {suffix} tells" if suffix else "text, as its name tells"
    return TextError("is not what its name says", path=path, expected=expected, found=content, remedy=remedy)


class _Rewound(io.RawIOBase):
    """A stream whose first bytes were read, and are given again."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Members(io.RawIOBase):
    """The members of an archive, decompressed one after another; zero bytes after a member are padding.

    The standard library's files ignore what follows the first member and cannot be read, and with it the
    text of a damaged second member.
    """

    def __init__(self, stream: BinaryIO, new: Callable[[], Any]) -> None:
        self._stream, self._new, self._member = stream, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._member.eof:
                if not (compressed := self._next_member()):
                    return 0
                self._member = self._new()
            else:
                compressed = self._stream.read(_CHUNK) if self._member.needs_input else b""
                if self._member.needs_input and not compressed:
                    raise EOFError("it ends before its end marker")
            data = self._member.decompress(compressed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_member(self) -> bytes:
        """Return the first bytes after the member that has ended, without padding; none at the end."""
        compressed = self._member.unused_data or self._stream.read(_CHUNK)
        while compressed and not compressed.lstrip(b"\0"):
            compressed = self._stream.read(_CHUNK)
        return compressed.lstrip(b"\0")
