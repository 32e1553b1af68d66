"""Reads rows of codewords inside Pallas kernels, a tile at a time, one codeword per lane.

A tile is one gather of the codes, one of their entries and an exclusive sum of their lengths, which gives
every codeword its column without waiting for the one before. The Triton backend has exactly this (gathers on
references, cumulative sums, dynamic loops). Tiles of 32 codewords, one for each row, keep the sum of a row
inside a warp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels import pytree
from pallas_kernels.operands import PackedMatrix, entry_field

Carry = TypeVar("Carry")
Visit = Callable[[Int32[Array, "*tile"], Int32[Array, "*tile"], Carry], Carry]

SIGNED_OFFSETS = 2**31
"""Elements that the 32-bit offsets of Pallas can address: Triton reads them as signed."""
WIDE_OFFSETS = 2**32
"""Bytes beyond which Pallas computes offsets in 64 bits."""


@pytree.register(
    leaves=("codes", "row_offsets", "entries", "levels"),
    static=("field_bits", "slots", "words", "width", "codes_per_word"),
)
@dataclasses.dataclass(frozen=True)
class PackedRefs:
    """A `PackedMatrix` as kernels take it; passed through `pallas_call`, its arrays become references.

    Only existing elements are read, whatever is stored.

    Attributes:
        codes: as in the matrix, or its bytes in pairs (`codes_per_word` = 2) where offsets cannot address
            single ones.
        row_offsets, levels: as in the matrix.
        entries: the words of the table one after the other, int32.
        field_bits, slots, words: those of the table.
        width: columns of a row.
        codes_per_word: codes in an element of `codes`.
    """

    codes: Any
    row_offsets: Any
    entries: Any
    levels: Any
    field_bits: int
    slots: int
    words: int
    width: int
    codes_per_word: int

    @classmethod
    def of(cls, packed: PackedMatrix) -> PackedRefs:
        """Return the operands for `packed`.

        Raises:
            NotImplementedError: one-byte codes of 2 to 4 GiB with an odd capacity, which cannot be read in
                pairs.
        """
        codes, codes_per_word = _addressable(jnp.asarray(packed.codes))
        table = packed.table
        entries = jax.lax.bitcast_convert_type(table.entries, jnp.int32).reshape(-1)
        arrays = codes, jnp.asarray(packed.row_offsets), entries, jnp.asarray(packed.levels)
        return cls(*arrays, table.field_bits, table.slots, table.words, packed.width, codes_per_word)

    @property
    def rows(self) -> int:
        """Rows of each matrix."""
        return self.levels.shape[1]

    def level_pair(self, expert: Any, row: Any, inside: Any = None) -> tuple[Array, Array]:
        """Return (minimum, maximum) of `row` in float32: a scalar, or an array of which some are `inside`."""
        column = jnp.zeros_like(row)
        at = lambda which: plt.load(self.levels.at[expert, row, column + which], mask=inside)
        return at(0).astype(jnp.float32), at(1).astype(jnp.float32)

    def visit(
        self, expert: Any, row: Any, tile: int, visit: Visit[Carry], carry: Carry, inside: Any = None
    ) -> Carry:
        """Compute `carry = visit(positions, digits, carry)` for each slot of each tile; digit 0: empty slot.

        `row` is a scalar, or an array of rows visited together (positions are then [row, tile]); rows not
        `inside` are empty.
        """
        start, stop = self._bounds(expert, row, inside)
        along = (lambda value: value[:, None]) if row.ndim else (lambda value: value)
        lane = jnp.arange(tile)[None] if row.ndim else jnp.arange(tile)

        def step(i: Array, state: tuple[Array, Carry]) -> tuple[Array, Carry]:
            at, carry = state
            k = along(start) + i * tile + lane
            live = k < along(stop)
            first = jnp.minimum(self._codes(expert, k, live), self.entries.shape[0] // self.words - 1)
            first = first * self.words
            entry = plt.load(self.entries.at[first], mask=live, other=0)
            length = entry & ((1 << self.field_bits) - 1)
            base = along(at) + jnp.cumsum(length, axis=-1) - length
            for word in range(self.words):
                if word:
                    entry = plt.load(self.entries.at[first + word], mask=live, other=0)
                for slot in range(self.slots):
                    offset, digit = entry_field(entry, self.field_bits, slot)
                    position = base + offset
                    carry = visit(position, jnp.where(position < self.width, digit, 0), carry)
            return jnp.minimum(at + jnp.sum(length, axis=-1), self.width), carry

        steps = pl.cdiv(jnp.max(stop - start) if row.ndim else stop - start, tile)
        return jax.lax.fori_loop(0, steps, step, (jnp.zeros_like(start), carry))[1]

    def _bounds(self, expert: Any, row: Any, inside: Any) -> tuple[Array, Array]:
        capacity = self.codes.shape[1] * self.codes_per_word
        other = None if inside is None else 0
        at = lambda bound: plt.load(self.row_offsets.at[expert, bound], mask=inside, other=other)
        return jnp.clip(at(row), 0, capacity), jnp.clip(at(row + 1), 0, capacity)

    def _codes(self, expert: Any, k: Array, live: Array) -> Int32[Array, "*tile"]:
        if self.codes_per_word == 1:
            return plt.load(self.codes.at[expert, k], mask=live, other=0).astype(jnp.int32)
        pair = plt.load(self.codes.at[expert, k >> 1], mask=live, other=0).astype(jnp.int32)
        return (pair >> ((k & 1) * 8)) & 0xFF


def _addressable(codes: Array) -> tuple[Array, int]:
    """Return (codes, codes per element): in pairs, uncopied, where offsets of bytes exceed 31 bits."""
    if not SIGNED_OFFSETS < codes.size * codes.dtype.itemsize <= WIDE_OFFSETS or codes.dtype != jnp.uint8:
        return codes, 1
    experts, capacity = codes.shape
    if capacity % 2:
        raise NotImplementedError(
            f"Pallas' Triton backend can address {codes.size:,} one-byte codes (2 to 4 GiB) only in pairs, "
            f"but the capacity {capacity} is odd: pad the codes to an even capacity"
        )
    return jax.lax.bitcast_convert_type(codes.reshape(experts, capacity // 2, 2), jnp.uint16), 2


def multiply_add(
    a: Float[Array, "*tile"], b: Float[Array, "*#tile"], c: Float[Array, "*tile"], *, compiled: bool
) -> Float[Array, "*tile"]:
    """Return `a * b + c` in float32, rounded once if `compiled`.

    XLA disables fusing the two in Triton, which doubles the arithmetic of a kernel that does little else.
    """
    if not compiled:
        return a * b + c
    [fused] = plt.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, jnp.broadcast_to(b, c.shape), c],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, jnp.float32)],
    )
    return fused
