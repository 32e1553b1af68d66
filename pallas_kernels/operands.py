"""The operands of the kernels: ternary matrices as codewords, and the table that decodes them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8, UInt16, UInt32

from pallas_kernels import pytree

AnyArray = jax.Array | np.ndarray

WORD_BITS = 32
DIGIT_BITS = 2


@pytree.register(leaves=("entries",), static=("field_bits", "slots", "max_length"))
@dataclasses.dataclass(frozen=True)
class DecodeTable:
    """A codebook of any kind, as kernels read it: codeword c stands for the ternary digits in `entries[c]`.

    Each word of an entry holds the codeword's length in its low `field_bits`, then `slots` fields, one for
    each nonzero digit: its position (`field_bits`) and the digit (2 bits; 0 marks an empty slot). A codeword
    with more nonzeros than slots continues in the next word, which repeats the length. An 8-bit Tunstall
    codebook is one word of two slots (1 KB), upstream's dictionary one word of three (256 KB).

    Attributes:
        entries: the words, in the order of the codes.
        field_bits: bits of a length and of a position: `max_length.bit_length()`.
        slots: nonzero digits per word: as many as needed, at most `(32 - field_bits) // (field_bits + 2)`.
        max_length: digits of the longest codeword.
    """

    entries: UInt32[AnyArray, "codeword words"]
    field_bits: int
    slots: int
    max_length: int

    @classmethod
    def from_digits(
        cls, lengths: Int32[np.ndarray, "codeword"], digits: UInt8[np.ndarray, "codeword max_length"]
    ) -> DecodeTable:
        """Build the table of codewords given as the rows of `digits`, each zero beyond its length.

        Raises:
            ValueError: a length is not in 1 to max_length, or a word cannot hold a position (2**15 digits or
                more).
        """
        max_length = digits.shape[1]
        if len(lengths) == 0 or lengths.min() < 1 or lengths.max() > max_length:
            found = sorted(set(lengths.tolist()))
            raise ValueError(f"expected lengths from 1 to {max_length}, found {found}")
        field_bits = max_length.bit_length()
        most_slots = (WORD_BITS - field_bits) // (field_bits + DIGIT_BITS)
        if most_slots < 1:
            raise ValueError(
                f"codewords of {max_length} digits do not fit a 32-bit entry: at most {2**15 - 1}"
            )
        codeword, position = np.nonzero(digits)
        rank = (np.cumsum(digits != 0, axis=1) - 1)[codeword, position]  # of a nonzero in its codeword
        nonzeros = max(1, int((digits != 0).sum(1).max()))
        words = -(-nonzeros // most_slots)
        slots = -(-nonzeros // words)
        entries = np.repeat(lengths.astype(np.uint32)[:, None], words, axis=1)
        digit = digits[codeword, position].astype(np.uint32)
        field = position.astype(np.uint32) | digit << np.uint32(field_bits)
        shift = (field_bits + rank % slots * (field_bits + DIGIT_BITS)).astype(np.uint32)
        np.bitwise_or.at(entries, (codeword, rank // slots), field << shift)
        return cls(entries, field_bits, slots, max_length)

    @property
    def words(self) -> int:
        """Words per entry."""
        return self.entries.shape[-1]


def entry_field(
    entry: Int32[Array, "*shape"], field_bits: int, slot: int
) -> tuple[Int32[Array, "*shape"], Int32[Array, "*shape"]]:
    """Return (position, digit) of one slot of entries as int32; the masks drop what the sign shifts in."""
    shift = field_bits + slot * (field_bits + DIGIT_BITS)
    return (entry >> shift) & ((1 << field_bits) - 1), (entry >> (shift + field_bits)) & 3


@pytree.register(leaves=("codes", "row_offsets", "levels", "table"), static=("width",))
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """The ternary matrices [expert, out, in] of several experts under one codebook.

    Element [e, r, c] is `(0, levels[e, r, 0], levels[e, r, 1])[digit]`, digit c of the row's codewords
    `codes[e, row_offsets[e, r] : row_offsets[e, r + 1]]`. A row has one codeword or more, and only its last
    one may run past `width`. The minimum and maximum of a row are its levels.

    Attributes:
        codes: codewords, row after row, each expert padded with zeros to the longest one.
        row_offsets: where rows begin, in codewords of the expert, and at last their number (out + 1 bounds).
        levels: (minimum, maximum) of each row, bfloat16 or float32.
        table: decodes the codewords.
        width: columns of the matrices ("in").
    """

    codes: UInt8[AnyArray, "expert capacity"] | UInt16[AnyArray, "expert capacity"]
    row_offsets: Int32[AnyArray, "expert bound"]
    levels: Float[AnyArray, "expert out 2"]
    table: DecodeTable
    width: int

    __iter__: ClassVar[None] = None  # `__getitem__` alone would make it iterable, without an end under jax

    @property
    def num_experts(self) -> int:
        """Number of matrices."""
        return self.codes.shape[-2]

    @property
    def rows(self) -> int:
        """Rows of each matrix ("out")."""
        return self.levels.shape[-2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(expert, out, in)."""
        return self.num_experts, self.rows, self.width

    @property
    def nbytes(self) -> int:
        """Bytes of codewords, row offsets and levels; the table, which matrices share, is not counted."""
        return self.codes.nbytes + self.row_offsets.nbytes + self.levels.nbytes

    def __getitem__(self, experts: slice | AnyArray) -> PackedMatrix:
        """Return some of the experts, by a slice or an array of indices."""
        codes, row_offsets, levels = self.codes[experts], self.row_offsets[experts], self.levels[experts]
        return dataclasses.replace(self, codes=codes, row_offsets=row_offsets, levels=levels)

    def row_bounds(self, expert: Int32[Array, "n"]) -> tuple[Int32[Array, "n out"], Int32[Array, "n out"]]:
        """Return (first codeword, number of codewords) of each row of some experts.

        They are within the capacity, whatever is stored.
        """
        bounds = jnp.clip(jnp.asarray(self.row_offsets)[expert], 0, self.codes.shape[-1])
        return bounds[:, :-1], jnp.maximum(bounds[:, 1:] - bounds[:, :-1], 0)

    def validate(self) -> None:
        """Check, on the host, the invariants that shapes do not show.

        Raises:
            ValueError: an invariant is broken; names the expert and row, with what was expected and found.
        """
        if self.levels.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"levels: expected bfloat16 or float32, found {self.levels.dtype}")
        expected = self.num_experts, self.rows + 1
        if self.row_offsets.shape != expected:
            raise ValueError(f"row_offsets: expected {expected}, found {self.row_offsets.shape}")
        for expert in range(self.num_experts):
            try:
                self.validate_expert(expert)
            except ValueError as error:
                raise ValueError(f"expert {expert}, {error}") from error

    def validate_expert(self, expert: int) -> None:
        """Check the codewords of one expert, on the host.

        It takes about 16 bytes of memory per codeword.

        Raises:
            ValueError: names the row, with what was expected and found.
        """
        offsets, codes = np.asarray(self.row_offsets[expert], np.int64), np.asarray(self.codes[expert])
        size = self.table.entries.shape[0]
        if offsets[0] != 0 or offsets[-1] > codes.size:
            found = f"{offsets[0]} to {offsets[-1]}"
            raise ValueError(f"row offsets: expected 0 to at most {codes.size}, found {found}")
        if (bad := np.flatnonzero(np.diff(offsets) < 1)).size:
            count = np.diff(offsets)[bad[0]]
            raise ValueError(f"row {bad[0]}: expected one codeword or more, found {count}")
        codes = codes[: offsets[-1]]
        if (bad := np.flatnonzero(codes >= size)).size:
            row = np.searchsorted(offsets, bad[0], side="right") - 1
            raise ValueError(f"row {row}: expected codes below {size}, found {codes[bad[0]]}")
        lengths = np.asarray(self.table.entries)[:, 0] & ((1 << self.table.field_bits) - 1)
        columns = np.add.reduceat(lengths[codes], offsets[:-1], dtype=np.int64)
        if (bad := np.flatnonzero(columns < self.width)).size:
            raise ValueError(f"row {bad[0]}: expected {self.width} columns, found {columns[bad[0]]}")
