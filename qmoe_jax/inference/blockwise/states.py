"""Hidden states of every token between layers: flat, in order, on disk where memory is short."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qmoe_jax.data.batching import round_up

BATCH_TOKENS = 8192
"""Padded tokens of a batch: enough to keep the device busy, while the attention weights stay under 1 GB."""

LENGTH_MULTIPLE = 64
"""Sequences are padded to a multiple of this, so a step compiles for few shapes."""

MEMORY_SHARE = 0.125
"""Hidden states beyond this share of the machine's memory go to a file: a comparison of two models has four."""


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Examples of similar length, padded together: `rows` of them at most, `length` tokens each."""

    examples: np.ndarray
    rows: int
    length: int


def plan_batches(lengths: np.ndarray) -> list[BatchPlan]:
    """Group examples by padded length; all batches of a length have one shape."""
    padded = np.array([round_up(int(length), LENGTH_MULTIPLE) for length in lengths])
    batches = []
    for length in np.unique(padded):
        members = np.flatnonzero(padded == length)
        rows = min(len(members), max(1, BATCH_TOKENS // int(length)))
        batches += [BatchPlan(members[i : i + rows], rows, int(length)) for i in range(0, len(members), rows)]
    return batches


def mask_of(batch: BatchPlan, lengths: np.ndarray) -> np.ndarray:
    """Bool `[row, length]`: True on real tokens."""
    mask = np.zeros((batch.rows, batch.length), bool)
    mask[: len(batch.examples)] = np.arange(batch.length) < lengths[batch.examples][:, None]
    return mask


class HiddenStates:
    """The states of all tokens, float32 `[token, feature]`: examples one after another.

    Attention sees only those that are `visible`, bool `[token]`, by default all. Beyond `MEMORY_SHARE` of the
    machine's memory the values lie in an unlinked temporary file in `folder`, mapped: it vanishes with the
    process, however that ends.
    """

    def __init__(
        self, lengths: Sequence[int], features: int, folder: Path, visible: np.ndarray | None = None
    ):
        self.lengths = np.asarray(lengths, np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        shape = (int(self.offsets[-1]), features)
        self.visible = np.ones(shape[0], bool) if visible is None else visible
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if 4 * shape[0] * shape[1] < MEMORY_SHARE * memory:
            self.values = np.zeros(shape, np.float32)
        else:
            path = folder / f".hidden-states.{os.getpid()}"
            self.values = np.memmap(path, np.float32, "w+", shape=shape)
            path.unlink()

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return int(self.offsets[-1])

    def gather(self, batch: BatchPlan) -> np.ndarray:
        """The states of a batch, padded with zeros: `[row, length, feature]`."""
        out = np.zeros((batch.rows, batch.length, self.values.shape[1]), np.float32)
        for row, start, stop in self._places(batch):
            out[row, : stop - start] = self.values[start:stop]
        return out

    def scatter(self, batch: BatchPlan, padded: np.ndarray) -> None:
        """Put the states of a batch back."""
        for row, start, stop in self._places(batch):
            self.values[start:stop] = padded[row, : stop - start]

    def visible_mask(self, batch: BatchPlan) -> np.ndarray:
        """Bool `[row, length]`: True on visible tokens."""
        mask = np.zeros((batch.rows, batch.length), bool)
        for row, start, stop in self._places(batch):
            mask[row, : stop - start] = self.visible[start:stop]
        return mask

    def flat(self, batch: BatchPlan) -> np.ndarray:
        """The token numbers of a batch's real tokens, in the order of its rows."""
        return np.concatenate([np.arange(start, stop) for _, start, stop in self._places(batch)])

    def _places(self, batch: BatchPlan) -> Iterator[tuple[int, int, int]]:
        for row, example in enumerate(batch.examples):
            yield row, int(self.offsets[example]), int(self.offsets[example + 1])
