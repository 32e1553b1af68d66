"""What the kernels read: ternary matrices as codewords, and the table that says what a codeword means."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, UInt8, UInt16, UInt32

from pallas_kernels import pytree

AnyArray = jax.Array | np.ndarray

WORD_BITS = 32
DIGIT_BITS = 2


@pytree.register(leaves=("entries",), static=("field_bits", "slots", "max_length"))
@dataclasses.dataclass(frozen=True)
class DecodeTable:
    """Any codebook as the kernels see it: codeword c stands for the ternary digits in `entries[c]`.

    Each word of an entry holds the codeword's length in its low `field_bits`, then `slots` fields, one for
    each nonzero digit: its position (`field_bits`) and the digit (2 bits; 0 marks an empty slot). A codeword
    with more nonzeros than slots goes on in the next word, which repeats the length. An 8-bit Tunstall
    codebook is one word of two slots (1 KB), upstream's dictionary one word of three (256 KB).

    Attributes:
      entries: the words, in the order of the codes.
      field_bits: bits of a length and of a position: `max_length.bit_length()`.
      slots: nonzero digits a word holds: as many as needed, at most `(32 - field_bits) // (field_bits + 2)`.
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
        """The table of codewords given as the rows of `digits`, each zero beyond its length.

        Raises:
          ValueError: a length is none of 1 to max_length, or a word cannot hold a position (2**15 digits or more).
        """
        max_length = digits.shape[1]
        if len(lengths) == 0 or lengths.min() < 1 or lengths.max() > max_length:
            raise ValueError(
                f"expected lengths from 1 to {max_length}, found {sorted(set(lengths.tolist()))}"
            )
        field_bits = max_length.bit_length()
        room = (WORD_BITS - field_bits) // (field_bits + DIGIT_BITS)
        if room < 1:
            raise ValueError(
                f"codewords of {max_length} digits do not fit a 32-bit entry: at most {2**15 - 1}"
            )
        codeword, position = np.nonzero(digits)
        rank = (np.cumsum(digits != 0, axis=1) - 1)[codeword, position]  # which nonzero of its codeword
        nonzeros = max(1, int((digits != 0).sum(1).max()))
        words = -(-nonzeros // room)
        slots = -(-nonzeros // words)
        entries = np.repeat(lengths.astype(np.uint32)[:, None], words, axis=1)
        field = position.astype(np.uint32) | digits[codeword, position].astype(np.uint32) << np.uint32(
            field_bits
        )
        shift = (field_bits + rank % slots * (field_bits + DIGIT_BITS)).astype(np.uint32)
        np.bitwise_or.at(entries, (codeword, rank // slots), field << shift)
        return cls(entries, field_bits, slots, max_length)

    @property
    def words(self) -> int:
        """Words of an entry."""
        return self.entries.shape[-1]


@pytree.register(leaves=("codes", "row_offsets", "levels", "table"), static=("width",))
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """The ternary matrices [out, in] of several experts under one codebook.

    The digits of row r of expert e are those of `codes[e, row_offsets[e, r] : row_offsets[e, r + 1]]`, one
    codeword after the other, cut at `width`: only the last codeword of a row may run past it. Digit 0 is
    zero, digit 1 `levels[e, r, 0]` (the row's minimum), digit 2 `levels[e, r, 1]` (its maximum).

    Attributes:
      codes: codewords, row after row, each expert padded with zeros to the longest one.
      row_offsets: where rows begin, in codewords of the expert, and at last their number (out + 1 bounds).
      levels: (minimum, maximum) of each row, bfloat16 or float32.
      table: what the codes mean.
      width: columns of the matrices ("in").
    """

    codes: UInt8[AnyArray, "expert capacity"] | UInt16[AnyArray, "expert capacity"]
    row_offsets: Int32[AnyArray, "expert bound"]
    levels: Float[AnyArray, "expert out 2"]
    table: DecodeTable
    width: int

    @property
    def num_experts(self) -> int:
        """Matrices held."""
        return self.codes.shape[-2]

    @property
    def rows(self) -> int:
        """Rows of each matrix ("out")."""
        return self.levels.shape[-2]

    def validate(self) -> None:
        """Checks on the host what the shapes cannot show.

        Raises:
          ValueError: names the expert and row, with what was expected and found.
        """
        offsets, codes = np.asarray(self.row_offsets), np.asarray(self.codes)
        if self.levels.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"levels: expected bfloat16 or float32, found {self.levels.dtype}")
        if offsets.shape != (self.num_experts, self.rows + 1):
            raise ValueError(
                f"row_offsets: expected {(self.num_experts, self.rows + 1)}, found {offsets.shape}"
            )
        for expert in range(self.num_experts):
            self._validate_expert(expert, codes[expert], offsets[expert])

    def _validate_expert(self, expert: int, codes: np.ndarray, offsets: np.ndarray) -> None:
        size = self.table.entries.shape[0]
        if offsets[0] != 0 or offsets[-1] > codes.size:
            expected = f"offsets from 0 to at most {codes.size}"
            raise ValueError(f"expert {expert}: expected {expected}, found {offsets[0]} to {offsets[-1]}")
        if (bad := np.flatnonzero(np.diff(offsets) < 1)).size:
            count = np.diff(offsets)[bad[0]]
            raise ValueError(f"expert {expert}, row {bad[0]}: expected one codeword or more, found {count}")
        if (bad := np.flatnonzero(codes[: offsets[-1]] >= size)).size:
            row = np.searchsorted(offsets, bad[0], side="right") - 1
            raise ValueError(
                f"expert {expert}, row {row}: expected codes below {size}, found {codes[bad[0]]}"
            )
        lengths = np.asarray(self.table.entries)[:, 0] & ((1 << self.table.field_bits) - 1)
        columns = np.add.reduceat(lengths[codes[: offsets[-1]]], offsets[:-1], dtype=np.int64)
        if (bad := np.flatnonzero(columns < self.width)).size:
            covered = columns[bad[0]]
            raise ValueError(f"expert {expert}, row {bad[0]}: expected {self.width} columns, found {covered}")
