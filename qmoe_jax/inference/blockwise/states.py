"""Hidden states of all tokens between layers, in memory or in a memory-mapped file."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qmoe_jax.data.batching import round_up
from qmoe_jax.files.errors import system_error
from qmoe_jax.files.space import allocate
from qmoe_jax.memory import usable_memory

BATCH_TOKENS = 8192
"""Padded tokens per batch: enough to keep the device busy while attention weights stay below 1 GB."""

LENGTH_MULTIPLE = 64
"""Sequence lengths are padded to a multiple of this, so that a step compiles for few shapes."""

MEMORY_SHARE = 0.125
"""Share of the memory that this process may use above which hidden states go to a file; a comparison of two
models keeps four."""


@dataclasses.dataclass(frozen=True)
class PaddedExamples:
    """Examples of similar length, padded to at most `rows` examples of `length` tokens each."""

    examples: np.ndarray
    rows: int
    length: int


def plan_batches(lengths: np.ndarray) -> list[PaddedExamples]:
    """Group examples by padded length; all batches of one length have the same shape."""
    padded = np.array([round_up(int(length), LENGTH_MULTIPLE) for length in lengths])
    batches = []
    for length in np.unique(padded):
        members = np.flatnonzero(padded == length)
        rows = min(len(members), max(1, BATCH_TOKENS // int(length)))
        batches += [
            PaddedExamples(members[i : i + rows], rows, int(length)) for i in range(0, len(members), rows)
        ]
    return batches


def mask_of(batch: PaddedExamples, lengths: np.ndarray) -> np.ndarray:
    """Return a mask `[row, length]` that is True on tokens and False on padding."""
    return row_mask(lengths[batch.examples], batch.rows, batch.length)


def row_mask(lengths: np.ndarray, rows: int, length: int) -> np.ndarray:
    """Return which places of padded rows, `[row, length]`, hold tokens; rows beyond `lengths` hold none."""
    mask = np.zeros((rows, length), bool)
    mask[: len(lengths)] = np.arange(length) < lengths[:, None]
    return mask


def _mapped(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    """Return zeros, float32, mapped from a file in `folder` that ends with them."""
    nbytes = 4 * shape[0] * shape[1]
    try:
        with tempfile.TemporaryFile(prefix=".hidden-states.", dir=folder) as file:
            allocate(file.fileno(), nbytes)
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as error:
        raise system_error(
            "hidden states that do not fit in memory cannot be written here", folder, error,
            expected=f"{nbytes:,} bytes free",
        ) from error  # fmt: skip


class HiddenStates:
    """Hidden states of all tokens, float32 `[token, feature]`, one example after another.

    Values that take more than `MEMORY_SHARE` of the memory that this process may use are mapped from a file
    without a name in `folder`, which disappears with the process. Its room on the disk is allocated at once.

    Raises:
        CheckpointError: the disk has no room for the file.
    """

    def __init__(self, lengths: Sequence[int], features: int, folder: Path):
        self.lengths = np.asarray(lengths, np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        shape = (int(self.offsets[-1]), features)
        if 4 * shape[0] * shape[1] < MEMORY_SHARE * usable_memory():
            self.values = np.zeros(shape, np.float32)
        else:
            self.values = _mapped(folder, shape)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.offsets[-1])

    def gather(self, batch: PaddedExamples) -> np.ndarray:
        """Return the states of a batch, padded with zeros, `[row, length, feature]`."""
        out = np.zeros((batch.rows, batch.length, self.values.shape[1]), np.float32)
        for row, start, stop in self._places(batch):
            out[row, : stop - start] = self.values[start:stop]
        return out

    def scatter(self, batch: PaddedExamples, padded: np.ndarray) -> None:
        """Write the states of a batch back."""
        for row, start, stop in self._places(batch):
            self.values[start:stop] = padded[row, : stop - start]

    def flat(self, batch: PaddedExamples) -> np.ndarray:
        """Return the numbers of the batch's tokens, in the order of its rows."""
        return np.concatenate([np.arange(start, stop) for _, start, stop in self._places(batch)])

    def _places(self, batch: PaddedExamples) -> Iterator[tuple[int, int, int]]:
        for row, example in enumerate(batch.examples):
            yield row, int(self.offsets[example]), int(self.offsets[example + 1])
