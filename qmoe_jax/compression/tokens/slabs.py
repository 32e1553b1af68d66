"""Batches of one stack in their fixed order, and slabs of them: the units in which hidden states move.

A slab is a run of consecutive batches: its hidden states are read, computed on, spilled and checksummed
together, and hosts are dealt whole slabs. The order of batches, and with it that of tokens, follows from the
lengths of the examples alone, so that the same sums come out on any number of devices and hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int64

from qmoe_jax.data.batching import round_up
from qmoe_jax.inference.blockwise.states import BATCH_TOKENS, LENGTH_MULTIPLE, row_mask

SLAB_BYTES = 1 << 27
"""Bytes of hidden states in a slab (128 MiB): split among 128 expert groups, 1 MiB each lie side by side."""

ATTENTION_BYTES = 1 << 28
"""Bytes of float32 attention weights of one batch in one attention layer, at most, beyond its first row."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples padded to one shape.

    Attributes:
        examples: their numbers.
        lengths: their tokens in this stack.
        rows: rows of the padded arrays, at least as many as there are examples.
        length: tokens of a row.
        context: tokens of a row of the encoder's states that the decoder attends to; 0 in the encoder.
    """

    examples: Int64[np.ndarray, "example"]
    lengths: Int64[np.ndarray, "example"]
    rows: int
    length: int
    context: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, length and context: batches of one shape share a compiled program."""
        return self.rows, self.length, self.context

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.lengths.sum())

    @property
    def mask(self) -> Bool[np.ndarray, "row token"]:
        """True on tokens, False on padding."""
        return row_mask(self.lengths, self.rows, self.length)

    def pad(self, x: Float32[np.ndarray, "token embed"]) -> Float32[np.ndarray, "row token embed"]:
        """Return the states of the batch's tokens as padded rows."""
        padded = np.zeros((self.rows, self.length, x.shape[1]), x.dtype)
        padded[self.mask] = x
        return padded


@dataclasses.dataclass(frozen=True)
class Slab:
    """A run of batches.

    Attributes:
        number: its place among the stack's slabs.
        batches: the batches.
        start: number of its first token in the stack's order.
        stop: one more than the number of its last token.
    """

    number: int
    batches: tuple[Batch, ...]
    start: int
    stop: int

    @property
    def examples(self) -> Int64[np.ndarray, "example"]:
        """The numbers of its examples in order."""
        return np.concatenate([batch.examples for batch in self.batches])

    @property
    def lengths(self) -> Int64[np.ndarray, "example"]:
        """The tokens of its examples in order."""
        return np.concatenate([batch.lengths for batch in self.batches])


@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """The order of a stack's tokens: slab by slab, batch by batch, example by example.

    Attributes:
        lengths: tokens of each example.
        slabs: the slabs.
    """

    lengths: Int64[np.ndarray, "example"]
    slabs: tuple[Slab, ...]

    @classmethod
    def of(
        cls, lengths: Sequence[int], contexts: Sequence[int] | None, heads: int, row_bytes: int
    ) -> TokenOrder:
        """Plan batches and slabs.

        Args:
            lengths: tokens of each example in this stack.
            contexts: tokens of each example in the encoder, in the decoder's stack; None in the encoder's.
            heads: attention heads.
            row_bytes: bytes of a token's hidden state.
        """
        own = np.asarray(lengths, np.int64)
        other = np.zeros_like(own) if contexts is None else np.asarray(contexts, np.int64)
        slabs: list[Slab] = []
        members: list[Batch] = []
        nbytes = start = stop = 0
        for batch in _batches(own, other, heads):
            weight = row_bytes * (batch.tokens + int(other[batch.examples].sum()))
            if members and nbytes + weight > SLAB_BYTES:
                slabs.append(Slab(len(slabs), tuple(members), start, stop))
                members, nbytes, start = [], 0, stop
            members.append(batch)
            nbytes, stop = nbytes + weight, stop + batch.tokens
        slabs.append(Slab(len(slabs), tuple(members), start, stop))
        return cls(own, tuple(slabs))

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.slabs[-1].stop

    def numbers(self, slab: Slab) -> Int64[np.ndarray, "token"]:
        """Return the numbers of a slab's tokens counted example after example, as the examples are given."""
        ends = np.cumsum(self.lengths)
        first = (ends - self.lengths)[slab.examples]
        place = np.cumsum(slab.lengths) - slab.lengths
        return np.repeat(first - place, slab.lengths) + np.arange(slab.stop - slab.start)

    def place(self, token: int) -> tuple[int, int]:
        """Return the example of a token, and its position there."""
        slab = next(slab for slab in self.slabs if token < slab.stop)
        ends = slab.start + np.cumsum(slab.lengths)
        index = int(np.searchsorted(ends, token, side="right"))
        return int(slab.examples[index]), int(token - (ends[index] - slab.lengths[index]))


def _batches(lengths: np.ndarray, contexts: np.ndarray, heads: int) -> Iterator[Batch]:
    """Yield batches of examples of one padded length and context, of which all have the same shape."""
    padded = np.array([round_up(int(length), LENGTH_MULTIPLE) for length in lengths])
    context = np.array([round_up(int(length), LENGTH_MULTIPLE) for length in contexts])
    for length, other in np.unique(np.stack([padded, context], 1), axis=0).tolist():
        examples = np.flatnonzero((padded == length) & (context == other))
        longest = max(length, other)
        rows = min(BATCH_TOKENS // longest, ATTENTION_BYTES // (4 * heads * length * longest))
        rows = min(len(examples), max(1, rows))
        for start in range(0, len(examples), rows):
            part = examples[start : start + rows]
            yield Batch(part, lengths[part], rows, int(length), int(other))
