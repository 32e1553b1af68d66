"""Zarr arrays read by tensorstore: local, remote, or inside an OCDBT database.

Memory: what is read, and the chunks under way: 64 MiB each as T5X writes them, and their compressed bytes. By
columns as many are under way as there are processors; else tensorstore decodes as many, and holds the
compressed bytes of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.foreign import foreign_error
from qmoe_jax.files.location import Location, first_line
from qmoe_jax.files.names import is_inside
from qmoe_jax.files.reading import parse_json
from qmoe_jax.files.tensor import Shard
from qmoe_jax.files.zarr_chunks import check_chunks
from qmoe_jax.memory import usable_memory

Metadata = dict[str, Any]

_UNDER_WAY = os.cpu_count() or 1
"""Chunks of a piece that are read and decoded at a time: one per processor."""


@dataclasses.dataclass(frozen=True)
class ZarrTensor:
    """An array in a directory, a `ChunkedTensor`. Reading rows decodes only the chunks that hold them.

    Attributes:
        location: the directory.
        store: the opened array.
        metadata: its .zarray; empty for zarr 3, whose metadata tensorstore has.
        bfloat16_bits: it is bfloat16 stored as uint16, as T5X did before its version 3.
    """

    location: Location
    store: ts.TensorStore
    metadata: Metadata
    bfloat16_bits: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of what `read` returns."""
        return np.dtype(ml_dtypes.bfloat16) if self.bfloat16_bits else self.store.dtype.numpy_dtype

    @property
    def rows_per_chunk(self) -> int:
        """The rows a chunk spans: reading fewer of them at a time reads the chunk several times."""
        chunk = self.store.chunk_layout.read_chunk.shape
        return int(chunk[0] or 1) if chunk else 1

    @property
    def has_chunk_files(self) -> bool:
        """True if its chunks are local files that `metadata` describes, which `shards` requires."""
        return bool(self.metadata) and self.location.spec["driver"] == "file"

    def read(self, rows: slice) -> np.ndarray:
        """Return rows. Raises `CheckpointError` if a chunk that holds them is missing or damaged."""
        return self._read(self.store[rows.start : rows.stop] if self.store.rank else self.store)

    def read_columns(self, rows: slice) -> Iterator[np.ndarray]:
        """Yield rows in pieces of as many of the second axis as a chunk spans. Raises as `read` does."""
        step = int((self.store.chunk_layout.read_chunk.shape or ())[1] or 1)
        for start in range(0, self.shape[1], step):
            stop = min(start + step, self.shape[1])
            yield self._read_gradually(self.store[rows.start : rows.stop, start:stop])

    def _read(self, part: ts.TensorStore) -> np.ndarray:
        self._require_memory(part)
        with self._refusing():
            return self._of_bits(part.read().result())

    def _read_gradually(self, part: ts.TensorStore) -> np.ndarray:
        """Return a part whose chunks lie side by side along the third axis, with few of them under way."""
        self._require_memory(part)
        array = np.empty(part.shape, part.dtype.numpy_dtype)
        target = ts.array(array, copy=False, write=True)
        width = int((self.store.chunk_layout.read_chunk.shape or ())[2] or 1)
        pending = deque[Any]()
        with self._refusing():
            for start in range(0, part.shape[2], width):
                if len(pending) == _UNDER_WAY:
                    pending.popleft().result()
                columns = slice(start, min(start + width, part.shape[2]))
                source = part[:, :, columns].translate_to[0, 0, 0]
                pending.append(target[:, :, columns].translate_to[0, 0, 0].write(source))
            while pending:
                pending.popleft().result()
        return self._of_bits(array)

    def _of_bits(self, array: np.ndarray) -> np.ndarray:
        return array.view(ml_dtypes.bfloat16) if self.bfloat16_bits else array

    def _require_memory(self, part: ts.TensorStore) -> None:
        # tensorstore ends the process where memory is refused.
        values = max(math.prod(part.shape), *_chunk_values(self.store))
        if (needed := values * self.store.dtype.numpy_dtype.itemsize) > (most := usable_memory()):
            raise CheckpointError(
                "an array takes more memory than there is",
                path=self.location.path,
                expected=f"at most {most:,} bytes",
                found=f"{needed:,} bytes: {list(part.shape)} of an array of {list(self.shape)}",
            )

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise CheckpointError(
                "a chunk is missing or damaged",
                path=self.location.path,
                found=first_line(error),
                remedy="copy the checkpoint again",
            ) from error

    def shards(self) -> Iterator[Shard]:
        """Return the chunk files, each with what is wrong with it; only where `has_chunk_files`."""
        return check_chunks(Path(self.location.path), self.metadata, self.store.dtype.numpy_dtype.itemsize)


def _chunk_values(store: ts.TensorStore) -> tuple[int, int]:
    """Return the numbers of values that are decoded and that are stored at once."""
    layout = store.chunk_layout
    decoded, stored = layout.read_chunk.shape or (), layout.write_chunk.shape or ()
    return math.prod(size or 1 for size in decoded), math.prod(size or 1 for size in stored)


def open_arrays(
    directory: Location, declared: Mapping[str, Metadata | None], *, uint16_is_bfloat16: bool = False
) -> dict[str, ZarrTensor]:
    """Open zarr 2 arrays below `directory`, all at once.

    An array is described by its own .zarray or, where there is none, by what is declared elsewhere. Its
    chunks and compressor are the .zarray's, whatever is declared: T5X does the same.

    Args:
        directory: the checkpoint.
        declared: names of the arrays' directories -> tensorstore specs; None where nothing is declared.
        uint16_is_bfloat16: arrays of uint16 hold the bits of bfloat16.

    Raises:
        CheckpointError: an array has no description, one that tensorstore refuses, or two that contradict
            each other.
    """
    _require_inside(directory, declared)
    files = {name: directory.store.read(f"{name}/.zarray") for name in declared}
    metadata = {}
    for name, file in files.items():
        with _refusing(directory / name):
            zarray = file.result().value
        metadata[name] = _metadata(directory / name, zarray, declared[name])
    specs = {name: _zarr_spec(metadata[name]) for name in declared}
    return {
        name: ZarrTensor(
            directory / name, store, metadata[name], uint16_is_bfloat16 and store.dtype == ts.uint16
        )
        for name, store in _open_all(directory, specs).items()
    }


def open_zarr3(directory: Location, names: list[str]) -> dict[str, ZarrTensor]:
    """Open the zarr 3 arrays in the directories `names` of `directory`. Raises as `open_arrays` does."""
    _require_inside(directory, names)
    stores = _open_all(directory, {name: {"driver": "zarr3"} for name in names})
    return {name: ZarrTensor(directory / name, store, {}) for name, store in stores.items()}


def _require_inside(directory: Location, names: Iterable[str]) -> None:
    """Raise `CheckpointError` for a name that leads out of a directory, or that no file system takes."""
    for name in names:
        if not is_inside(name):
            raise CheckpointError(
                "the index points outside its directory",
                path=directory.path,
                expected="names of arrays' directories beside the index",
                found=name,
            )


def _zarr_spec(metadata: Metadata) -> Metadata:
    return {
        "driver": "zarr",
        "metadata": metadata,
        "assume_metadata": True,
        # Without a fill value every chunk was written, zeros too: a missing one was lost.
        "fill_missing_data_reads": metadata.get("fill_value") is not None,
    }


def _open_all(directory: Location, specs: Mapping[str, Metadata]) -> dict[str, ts.TensorStore]:
    opening, stores = {}, {}
    for name, spec in specs.items():
        with _refusing(directory / name):
            opening[name] = ts.open(
                {**spec, "open": True, "kvstore": (directory / name).spec},
                read=True,
                context=directory.context,
            )
    for name, future in opening.items():
        with _refusing(directory / name):
            stores[name] = future.result()
    return stores


@contextlib.contextmanager
def _refusing(location: Location) -> Iterator[None]:
    """Turn tensorstore's errors into `CheckpointError`."""
    try:
        yield
    # The last three are its bindings': text that is not Unicode, numbers of more than 64 bits.
    except (ValueError, OSError, RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(
            "tensorstore cannot open the array", path=location.path, found=first_line(error)
        ) from error


def _metadata(location: Location, zarray: bytes, declared: Metadata | None) -> Metadata:
    if not zarray:
        return _declared_metadata(location, declared)
    try:
        metadata = parse_json(zarray)
        shape = _require_grid(metadata)
    except (ValueError, TypeError, KeyError) as error:
        raise foreign_error(f"{location.path}/.zarray", zarray) or CheckpointError(
            "is not JSON that describes an array",
            path=f"{location.path}/.zarray",
            expected="an object with a shape, chunks, and how they are compressed",
            found=repr(error),
            remedy="copy the checkpoint again",
        ) from error
    stated = None if declared is None else _members(location, declared).get("shape")
    if stated is not None and stated not in (shape, tuple(shape)):
        raise CheckpointError(
            "the array has another shape than in the checkpoint's index",
            path=f"{location.path}/.zarray",
            expected=stated,
            found=shape,
        )
    return metadata


def _declared_metadata(location: Location, spec: Metadata | None) -> Metadata:
    """Return the .zarray of a spec.

    The dtype of a spec is a NumPy name or, in old specs, a zarr string in `metadata`.
    """
    members = _members(location, spec) if spec else {}
    name = spec.get("dtype", members.get("dtype")) if spec else None
    if name is None or not {"shape", "chunks"} <= members.keys():
        raise CheckpointError("the array has no description", path=location.path, expected="a file .zarray")
    try:
        stored = "bfloat16" if name == "bfloat16" else np.dtype(name).str
        _require_grid(members)
    except (ValueError, TypeError) as error:
        raise _damaged_index(location, error) from error
    return {
        "compressor": None,
        "dimension_separator": ".",
        "fill_value": None,
        "filters": None,
        "order": "C",
        **members,
        "dtype": stored,
        "zarr_format": 2,
    }


def _members(location: Location, spec: Metadata) -> Metadata:
    """Return the description in a spec. Raises `CheckpointError` where there is none."""
    if not isinstance(spec["metadata"], dict):
        raise _damaged_index(location, f"metadata of type {type(spec['metadata']).__name__}")
    return spec["metadata"]


def _damaged_index(location: Location, found: object) -> CheckpointError:
    return CheckpointError(
        "the checkpoint's index describes no array here",
        path=location.path,
        expected="the tensorstore spec of a zarr array",
        found=found,
        remedy="copy the checkpoint again",
    )


def _require_grid(metadata: Metadata) -> list[int]:
    """Return the shape that a .zarray states, after a check of all that `check_chunks` takes from it.

    Raises:
        ValueError, TypeError, KeyError: it is not a .zarray.
    """
    shape, chunks = list(metadata["shape"]), list(metadata["chunks"])
    sizes = [*((0, size) for size in shape), *((1, size) for size in chunks)]
    if len(shape) != len(chunks) or any(type(size) is not int or size < least for least, size in sizes):
        raise ValueError(f"shape {shape} in chunks of {chunks}")
    if metadata.get("dimension_separator", ".") not in (".", "/"):
        raise ValueError(f"dimension_separator {metadata['dimension_separator']!r}")
    compressor = metadata.get("compressor")
    if compressor is not None and not (
        isinstance(compressor, dict) and isinstance(compressor.get("id"), str)
    ):
        raise ValueError(f"compressor {compressor!r}")
    return shape
