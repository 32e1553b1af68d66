"""What an encoder reads, the codebook as a trie, and what it writes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Bool, Int32, UInt8, UInt16

from pallas_kernels import pytree
from pallas_kernels.operands import AnyArray


@pytree.register(leaves=("follow", "code", "last_code"), static=("symbol_digits",))
@dataclasses.dataclass(frozen=True)
class EncodeTable:
    """Any codebook as encoders see it: a tree of symbols, node 0 the root.

    A symbol is `symbol_digits` consecutive digits, the first the least significant in base 3. Every node ends a
    codeword or has all of its children, so that a greedy encoder never gets stuck; kernels trust that the nodes
    in `follow` exist.

    Attributes:
      follow: where an encoder goes on: the child, or ~(the root's child) where a codeword ends before the symbol.
      code: the codeword that ends in a node; anything where none does.
      last_code: the codeword to write where a row ends in a node: its own, else one that passes through it (its
        tail runs past the row and is ignored).
      symbol_digits: digits that belong together.
    """

    follow: Int32[AnyArray, "node symbol"]
    code: UInt8[AnyArray, "node"] | UInt16[AnyArray, "node"]
    last_code: UInt8[AnyArray, "node"] | UInt16[AnyArray, "node"]
    symbol_digits: int

    @property
    def fanout(self) -> int:
        """How many symbols there are."""
        return 3**self.symbol_digits

    def symbols(self, width: int) -> int:
        """Symbols of a row, and the most codewords it may take; zeros follow a row."""
        return -(-width // self.symbol_digits)


class EncodedRows(NamedTuple):
    """Rows as codewords: row r is `codes[..., row_offsets[..., r] : row_offsets[..., r + 1]]`, zeros behind them.

    Where the codewords do not fit the capacity, those beyond it are missing; the offsets are right all the same,
    so that their last one is the capacity to try.
    """

    codes: UInt8[Array, "*expert capacity"] | UInt16[Array, "*expert capacity"]
    row_offsets: Int32[Array, "*expert bound"]

    @property
    def fits(self) -> Bool[Array, "*expert"]:
        """Whether the capacity sufficed."""
        return self.row_offsets[..., -1] <= self.codes.shape[-1]
