"""The chunk files of a local zarr array: which are missing, and which are cut short.

Memory: the names of the chunks; of a file at most its first 512 and last four bytes are read.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qmoe_jax.files.foreign import read_head, recognize
from qmoe_jax.files.tensor import Shard

# Threads that wait for the disk; more do not make a local one faster.
_THREADS = 8
# Missing chunks that are named one by one; more, and the description lies or nearly nothing was copied.
_MOST_MISSING = 10_000
# Bytes of a gzip file without data: ten of header, eight of trailer.
_SMALLEST_GZIP = 18
# Bytes of a blosc chunk's header; the second word is the size of the content.
_SMALLEST_BLOSC = 16
_ZSTD = b"\x28\xb5\x2f\xfd"


def check_chunks(directory: Path, metadata: Mapping[str, Any], itemsize: int) -> Iterator[Shard]:
    """Yield every chunk file that `metadata` (a .zarray) requires, each with what is wrong with it.

    Only sizes and last bytes are checked; content is checked when it is read. A missing chunk holds the fill
    value, or was lost if there is none.
    """
    separator = metadata.get("dimension_separator", ".")
    grid = [range(-(-n // chunk)) for n, chunk in zip(metadata["shape"], metadata["chunks"], strict=True)]
    sizes = _file_sizes(directory)
    count, fills = math.prod(map(len, grid)), metadata.get("fill_value") is not None
    if count > len(sizes) + _MOST_MISSING and not fills:
        yield Shard(
            directory.name, None, f"most of its {count:,} chunks are missing: found {len(sizes)} files"
        )
        return
    if count > len(sizes) + _MOST_MISSING:
        names = [name for name in sizes if _is_chunk(name, separator, grid)]
    else:
        names = [separator.join(map(str, index)) or "0" for index in itertools.product(*grid)]
    present = [name for name in names if name in sizes]
    if fills:
        names = present
    compressor = (metadata.get("compressor") or {}).get("id")
    expected = math.prod(metadata["chunks"]) * itemsize
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _problem(directory / name, sizes[name], compressor, expected), present)
        problems = dict(zip(present, found, strict=True))
    for name in names:
        yield Shard(f"{directory.name}/{name}", sizes.get(name), problems.get(name, "missing"))


def _is_chunk(name: str, separator: str, grid: Sequence[range]) -> bool:
    index = name.split(separator)
    return len(index) == len(grid) and all(
        part.isascii() and part.isdigit() and str(int(part)) == part and int(part) in axis
        for part, axis in zip(index, grid, strict=True)
    )


def _problem(file: Path, size: int, compressor: str | None, expected: int) -> str | None:
    problem = _wrong_size(file, size, compressor, expected)
    known = recognize(read_head(file)) if problem else None
    # A chunk is compressed itself: that it is gzip is not news.
    return str(known) if known and "compressed" not in known.problem else problem


def _wrong_size(file: Path, size: int, compressor: str | None, expected: int) -> str | None:
    if compressor is None and size != expected:
        return f"expected {expected:,} bytes, found {size:,}"
    if compressor == "gzip":
        if size < _SMALLEST_GZIP:
            return f"cut short: found {size} bytes"
        # The file ends with the size of its content modulo 2^32, unless it was cut short.
        if (found := _last_word(file)) != expected % 2**32:
            return f"cut short or damaged: expected a content of {expected:,} bytes, found {found:,}"
    if compressor == "blosc":
        # tensorstore allocates the size of the content that the header states, whatever it is.
        found = int.from_bytes(read_head(file)[4:8], "little")
        if size < _SMALLEST_BLOSC or found != expected:
            return f"cut short or damaged: expected a content of {expected:,} bytes, found {found:,}"
    if compressor == "zstd" and not read_head(file).startswith(_ZSTD):
        return f"cut short or damaged: not compressed by zstd, {size:,} bytes"
    return None


def _file_sizes(directory: Path) -> dict[str, int]:
    """Return the sizes of the files below a directory by relative path; none if it does not exist."""
    files = (Path(root, name) for root, _, names in os.walk(directory) for name in names)
    return {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}


def _last_word(file: Path) -> int:
    with open(file, "rb") as stream:
        stream.seek(-4, os.SEEK_END)
        return int.from_bytes(stream.read(4), "little")
