"""How the Pallas kernels read a row: tiles of codewords, a lane each.

A tile is one gather of the codes, one of their entries and an exclusive sum of their lengths, which gives
every codeword its position without waiting for the one before. The Triton backend can do exactly this
(gathers on references, cumulative sums, dynamic loops), and one row a warp keeps the sum inside the warp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int32

from pallas_kernels.operands import PackedMatrix
from pallas_kernels.streams import field

Carry = TypeVar("Carry")
Visit = Callable[[Int32[Array, "tile"], Int32[Array, "tile"], Carry], Carry]


def stream_operands(packed: PackedMatrix) -> tuple[Array, Array, Array]:
    """(codes, row offsets, entries) as `StreamReader` wants their references.

    Raises:
      NotImplementedError: codes of 2 to 4 GiB, whose offsets Pallas computes in 32 bits that Triton reads as
        signed.
    """
    codes = jnp.asarray(packed.codes)
    if 2**31 < codes.size * codes.dtype.itemsize <= 2**32:
        raise NotImplementedError(
            f"Pallas' Triton backend cannot address codes of {codes.size * codes.dtype.itemsize:,} bytes "
            f"(between 2 and 4 GiB): hold the experts in two PackedMatrix"
        )
    entries = jax.lax.bitcast_convert_type(packed.table.entries, jnp.int32)
    return codes, jnp.asarray(packed.row_offsets), entries.reshape(-1)


@dataclasses.dataclass(frozen=True)
class StreamReader:
    """Reads rows inside a kernel; whatever is stored, only existing elements are touched.

    Attributes:
      field_bits, slots, words: the table's.
      width: columns of a row.
      tile: codewords at a time, a power of two.
    """

    field_bits: int
    slots: int
    words: int
    width: int
    tile: int

    @classmethod
    def of(cls, packed: PackedMatrix, tile: int) -> StreamReader:
        """A reader for the rows of `packed`."""
        table = packed.table
        return cls(table.field_bits, table.slots, table.words, packed.width, tile)

    def visit_row(
        self, refs: tuple[Any, Any, Any], expert: Any, row: Any, visit: Visit[Carry], carry: Carry
    ) -> Carry:
        """`carry = visit(positions, digits, carry)` for each slot of each tile; digit 0: nothing is there.

        `refs` are the references to what `stream_operands` gave.
        """
        codes, offsets, entries = refs
        start = jnp.clip(offsets[expert, row], 0, codes.shape[1])
        stop = jnp.clip(offsets[expert, row + 1], 0, codes.shape[1])
        lane = jnp.arange(self.tile)

        def step(i: Array, state: tuple[Array, Carry]) -> tuple[Array, Carry]:
            at, carry = state
            k = start + i * self.tile + lane
            code = plt.load(codes.at[expert, k], mask=k < stop, other=0).astype(jnp.int32)
            first = jnp.minimum(code, entries.shape[0] // self.words - 1) * self.words
            entry = plt.load(entries.at[first], mask=k < stop, other=0)
            length = entry & ((1 << self.field_bits) - 1)
            base = at + jnp.cumsum(length) - length
            for word in range(self.words):
                if word:
                    entry = plt.load(entries.at[first + word], mask=k < stop, other=0)
                for slot in range(self.slots):
                    offset, digit = field(entry, self.field_bits, slot)
                    position = base + offset
                    carry = visit(position, jnp.where(position < self.width, digit, 0), carry)
            return jnp.minimum(at + jnp.sum(length), self.width), carry

        return jax.lax.fori_loop(0, pl.cdiv(stop - start, self.tile), step, (jnp.int32(0), carry))[1]
