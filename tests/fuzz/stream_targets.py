"""Packed matrices of any bytes, in every consumer on a CPU: nothing is read or written outside the arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from qmoe_jax.coding import Codebook, CorruptStream, EncodedRows, decode
from qmoe_jax.files.errors import CheckpointError
from tests.fuzz.target import Target
from tests.helpers import packed_samples as samples
from tests.helpers.pages import at_the_end_of_a_page

EXPERTS, ROWS, WIDTH, TOKENS = 2, 4, 20, 3
BOOKS = {"8": "tunstall-8", "10": "tunstall-10", "upstream": "upstream"}
_TABLE_BYTES = 4096
"""Bytes of the table that are part of the input."""


def _packed(book: str) -> pk.PackedMatrix:
    return samples.sample(samples.CODEBOOKS[BOOKS[book]](), (EXPERTS, ROWS, WIDTH)).packed


def _write(book: str, table: bool) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        packed = _packed(book)
        parts = [packed.row_offsets, packed.codes, np.asarray(packed.levels)]
        parts += [packed.table.entries.reshape(-1)[: _TABLE_BYTES // 4]] if table else []
        file = directory / "stream"
        file.write_bytes(b"".join(part.tobytes() for part in parts))
        return file

    return write


def _read(book: str, table: bool, data: bytes) -> pk.PackedMatrix:
    """Return the matrices of a stream of any length: missing bytes are zero, further ones are left out."""
    packed = _packed(book)
    arrays = {}
    for name in ("row_offsets", "codes", "levels"):
        array = np.asarray(getattr(packed, name))
        part = data[: array.nbytes].ljust(array.nbytes, b"\0")
        data = data[array.nbytes :]
        arrays[name] = at_the_end_of_a_page(np.frombuffer(part, array.dtype).reshape(array.shape))
    entries = packed.table.entries.copy()
    if table:
        changed = np.frombuffer(data[: len(data) // 4 * 4][:_TABLE_BYTES], np.uint32)
        entries.reshape(-1)[: min(len(changed), entries.size)] = changed[: entries.size]
    table_ = dataclasses.replace(packed.table, entries=at_the_end_of_a_page(entries))
    return dataclasses.replace(packed, **arrays, table=table_)


def _load(book: str, table: bool) -> Callable[[Path], None]:
    def load(directory: Path) -> None:
        file = directory / "stream"
        packed = _read(book, table, file.read_bytes())
        x = jnp.ones((TOKENS, WIDTH), jnp.float32)
        expert_index = jnp.arange(TOKENS, dtype=jnp.int32) % EXPERTS
        dense = np.asarray(pk.unpack(packed, backend="cpu"))
        levels = np.concatenate([np.zeros((EXPERTS, ROWS, 1)), np.asarray(packed.levels, np.float32)], -1)
        same = (dense[..., None] == levels[:, :, None, :]) | np.isnan(dense[..., None])
        assert same.any(-1).all(), "a value that is no level"
        assert pk.packed_matmul(packed, x, expert_index, backend="cpu").shape == (TOKENS, ROWS)
        try:
            packed.validate()
            for codes, offsets in zip(packed.codes, packed.row_offsets, strict=True):
                decode(EncodedRows(codes[: offsets[-1]], offsets), _codebook(book), WIDTH)
        except ValueError as error:
            raise CheckpointError("is no stream", path=file, found=error) from error

    return load


def _codebook(book: str) -> Codebook:
    return samples.CODEBOOKS[BOOKS[book]]()


def load_decoded(directory: Path) -> None:
    """Decode rows of a stream: offsets, then codes."""
    data = (directory / "stream").read_bytes()
    packed = _packed("8")
    count = packed.row_offsets[0].nbytes
    offsets = np.frombuffer(data[:count].ljust(count, b"\0"), np.int32)
    try:
        digits = np.asarray(
            decode(EncodedRows(np.frombuffer(data[count:], np.uint8), offsets), _codebook("8"), WIDTH)
        )
    except CorruptStream as error:
        raise CheckpointError("is no stream", path=directory / "stream", found=error) from error
    assert digits.shape == (ROWS, WIDTH) and digits.max() <= 2


def _write_one(directory: Path) -> Path:
    packed = _packed("8")
    file = directory / "stream"
    used = packed.row_offsets[0][-1]
    file.write_bytes(packed.row_offsets[0].tobytes() + packed.codes[0][:used].tobytes())
    return file


TARGETS = (
    *(Target(f"packed-{book}", _write(book, False), _load(book, False)) for book in BOOKS),
    *(Target(f"packed-table-{book}", _write(book, True), _load(book, True)) for book in ("8", "upstream")),
    Target("stream", _write_one, load_decoded),
)
