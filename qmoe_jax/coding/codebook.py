"""Variable-to-fixed codes over ternary digits: the codewords, and the trie that an encoder walks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int32, UInt8

from pallas_kernels import pytree
from pallas_kernels.encode_rows import EncodeTable
from pallas_kernels.operands import DecodeTable

MAX_CODEWORDS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Trie:
    """The codewords as a tree of symbols (see `EncodeTable`); node 0 is the root.

    Attributes:
        child: the node that a symbol leads to, -1 where there is none.
        code: the codeword that ends in a node, -1 where none does.
        last_code: the codeword to write where a row ends in a node: its own, else the one that the lowest
            symbols lead to (its tail runs past the row and is ignored).
    """

    child: Int32[np.ndarray, "node symbol"]
    code: Int32[np.ndarray, "node"]
    last_code: Int32[np.ndarray, "node"]


@pytree.register(leaves=("lengths", "digits"), static=("name", "symbol_digits"))
@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """Codewords that each stand for a sequence of ternary digits; a codeword's rank is its code.

    A row is coded greedily by the longest codeword that matches. This never gets stuck because each node of
    the trie ends a codeword or has all of its children (checked): a dictionary closed under prefixes
    satisfies this, and so do the leaves of a complete tree. Two codebooks are equal if their codewords are.

    Attributes:
        name: its name in an artifact and in reports.
        lengths: digits of each codeword, at least 1.
        digits: the codewords, one per row, zero beyond their length.
        symbol_digits: digits per symbol; all lengths are multiples of it.
    """

    name: str
    lengths: Int32[np.ndarray, "codeword"]
    digits: UInt8[np.ndarray, "codeword max_length"]
    symbol_digits: int = 1

    @property
    def size(self) -> int:
        """Number of codewords."""
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """Digits of the longest codeword."""
        return self.digits.shape[1]

    @property
    def code_dtype(self) -> np.dtype:
        """The type that codes are stored in: uint8 for up to 256 codewords, else uint16."""
        return np.dtype(np.uint8 if self.size <= 256 else np.uint16)

    @functools.cached_property
    def decode_table(self) -> DecodeTable:
        """The codebook as the kernels take it, in host memory."""
        return DecodeTable.from_digits(self.lengths, self.digits)

    @functools.cached_property
    def trie(self) -> Trie:
        """The codewords as a tree."""
        return _build_trie(self)

    @functools.cached_property
    def encode_table(self) -> EncodeTable:
        """The codebook as encoders take it, in host memory."""
        trie, dtype = self.trie, self.code_dtype
        follow = np.where(trie.child >= 0, trie.child, ~trie.child[0])
        return EncodeTable(follow, trie.code.astype(dtype), trie.last_code.astype(dtype), self.symbol_digits)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the codewords and their symbols; the name does not enter."""
        sha = hashlib.sha256(np.array([self.symbol_digits, *self.digits.shape], "<i4").tobytes())
        sha.update(self.lengths.astype("<i4").tobytes())
        sha.update(np.ascontiguousarray(self.digits).tobytes())
        return sha.hexdigest()

    def validate(self) -> None:
        """Check the invariants.

        Raises:
            ValueError: an invariant is broken; the message names the codeword, with what was expected and
                found.
        """
        if not 0 < self.size <= MAX_CODEWORDS:
            raise ValueError(f"{self.name}: expected 1 to {MAX_CODEWORDS} codewords, found {self.size}")
        lengths_fit = (self.lengths >= 1) & (self.lengths <= self.max_length)
        lengths_fit &= self.lengths % self.symbol_digits == 0
        beyond = np.arange(self.max_length) >= self.lengths[:, None]
        digits_fit = ((self.digits <= 2) & ~(beyond & (self.digits != 0))).all(1)
        if (bad := np.flatnonzero(~lengths_fit)).size:
            expected = f"a multiple of {self.symbol_digits} up to {self.max_length}"
            raise ValueError(
                f"{self.name}, codeword {bad[0]}: length {self.lengths[bad[0]]}, expected {expected}"
            )
        if (bad := np.flatnonzero(~digits_fit)).size:
            raise ValueError(
                f"{self.name}, codeword {bad[0]}: expected digits 0, 1, 2, and 0 beyond its length"
            )
        trie = self.trie
        if (ends := np.bincount(trie.code[trie.code >= 0], minlength=self.size)).min() == 0:
            raise ValueError(f"{self.name}, codeword {ends.argmin()}: another codeword has the same digits")
        stuck = (trie.code < 0) & (trie.child < 0).any(1)
        if (bad := np.flatnonzero(stuck)).size:
            raise ValueError(f"{self.name}: after trie node {bad[0]} some digits match no codeword")

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, np.ndarray]) -> Codebook:
        """Return the codebook of stored arrays: `lengths`, `digits` and the scalar `symbol_digits`.

        Raises:
            KeyError: an array is missing.
            ValueError: the arrays are not a codebook.
        """
        lengths, digits = np.asarray(arrays["lengths"], np.int32), np.asarray(arrays["digits"], np.uint8)
        if lengths.ndim != 1 or digits.ndim != 2 or len(lengths) != len(digits):
            found = f"{lengths.shape}, {digits.shape}"
            raise ValueError(f"{name}: expected lengths [n] and digits [n, max_length], found {found}")
        codebook = cls(name, lengths, digits, int(arrays["symbol_digits"]))
        codebook.validate()
        return codebook

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codebook) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def _symbols(codebook: Codebook) -> Int32[np.ndarray, "codeword symbols"]:
    """Return the codewords as symbols, first digit least significant."""
    step = codebook.symbol_digits
    padded = np.pad(codebook.digits, ((0, 0), (0, -codebook.max_length % step)))
    grouped = padded.reshape(codebook.size, -1, step).astype(np.int32)
    return (grouped * 3 ** np.arange(step, dtype=np.int32)).sum(-1, dtype=np.int32)


def _build_trie(codebook: Codebook) -> Trie:
    """Build the trie depth by depth: a node is a distinct pair of its parent and a symbol."""
    symbols, fanout = _symbols(codebook), 3**codebook.symbol_digits
    depth_of = codebook.lengths // codebook.symbol_digits
    node_of = np.zeros(codebook.size, np.int64)  # the node each codeword has reached so far
    edges, count = [], 1
    for depth in range(symbols.shape[1]):
        alive = np.flatnonzero(depth_of > depth)
        edge, which = np.unique(node_of[alive] * fanout + symbols[alive, depth], return_inverse=True)
        node_of[alive] = count + which
        edges.append(edge)
        count += len(edge)
    child = np.full((count, fanout), -1, np.int32)
    child.reshape(-1)[np.concatenate(edges)] = np.arange(1, count)
    code = np.full(count, -1, np.int32)
    code[node_of] = np.arange(codebook.size)
    return Trie(child, code, _last_codes(child, code))


def _last_codes(
    child: Int32[np.ndarray, "node symbol"], code: Int32[np.ndarray, "node"]
) -> Int32[np.ndarray, "node"]:
    """Return the last codes: a node without a codeword goes down to its first child, until all have one."""
    first_child = np.take_along_axis(child, (child >= 0).argmax(1)[:, None], 1)[:, 0]
    node = np.arange(len(code))
    while (inner := code[node] < 0).any():
        node = np.where(inner, first_child[node], node)
    return code[node]
