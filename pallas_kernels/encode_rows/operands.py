"""The operand of the encoders, a codebook as a trie, and their result."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxtyping import Int32, UInt8, UInt16

from pallas_kernels import pytree
from pallas_kernels.operands import AnyArray


@pytree.register(leaves=("follow", "code", "last_code"), static=("symbol_digits",))
@dataclasses.dataclass(frozen=True)
class EncodeTable:
    """A codebook as encoders take it: a tree of symbols, node 0 the root.

    A symbol is `symbol_digits` consecutive digits, the first the least significant in base 3. Every node ends
    a codeword or has all of its children, so that a greedy encoder never gets stuck; kernels trust that the
    nodes in `follow` exist.

    Attributes:
        follow: the next node: the child, or ~(the root's child) where a codeword ends before the symbol.
        code: the codeword that ends in a node; any number where none does.
        last_code: the codeword to write where a row ends in a node: its own, else one that passes through it
            (its tail runs past the row and is ignored).
        symbol_digits: digits per symbol.
    """

    follow: Int32[AnyArray, "node symbol"]
    code: UInt8[AnyArray, "node"] | UInt16[AnyArray, "node"]
    last_code: UInt8[AnyArray, "node"] | UInt16[AnyArray, "node"]
    symbol_digits: int

    @property
    def fanout(self) -> int:
        """The number of different symbols."""
        return 3**self.symbol_digits

    def symbols(self, width: int) -> int:
        """Return the symbols of a row, which are the most codewords it may take; zeros follow a row."""
        return -(-width // self.symbol_digits)


class EncodedRows(NamedTuple):
    """Rows as codewords: row r is `codes[..., row_offsets[..., r] : row_offsets[..., r + 1]]`.

    Attributes:
        codes: the codewords, row after row; `encode_rows` returns room for the most codewords, zeros after
            the last.
        row_offsets: where each row begins among the codes, and the end of the last one.
    """

    codes: UInt8[AnyArray, "*expert codeword"] | UInt16[AnyArray, "*expert codeword"]
    row_offsets: Int32[AnyArray, "*expert bound"]
