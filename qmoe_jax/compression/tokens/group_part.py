"""The hidden states behind one expert group: written as they are computed, each to its slab's segment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from qmoe_jax.compression.tokens.store import PartWriter, TokenStore
from qmoe_jax.files.errors import CheckpointError


class GroupPart:
    """Writer of the states behind a group, in the order in which those in front of it lie."""

    def __init__(
        self,
        folder: Path,
        group: int,
        routed: TokenStore,
        refuse: Callable[[int], CheckpointError] | None = None,
    ):
        """Begin.

        Args:
            folder: of the states behind the experts.
            group: number of the group.
            routed: the states in front of them.
            refuse: returns the error for one of the group's tokens whose state is not finite; None where
                `append` is not told.
        """
        self._group, self._refuse = group, refuse
        self._writer = PartWriter(folder, part_name(group))
        self._left = [[slab, routed.segments[slab, group].rows] for slab in routed.slabs(group)]
        self._done = 0

    def append(
        self, x: Float32[np.ndarray, "token embed"], sound: Bool[np.ndarray, "token"] | None = None
    ) -> None:
        """Write the next tokens; raises for the first that is not sound."""
        if sound is not None and self._refuse is not None and not sound.all():
            raise self._refuse(self._done + int(sound.argmin()))
        self._done += len(x)
        while len(x):
            slab, rows = self._left[0]
            self._writer.append(slab, self._group, x[:rows])
            self._left[0][1] -= min(rows, len(x))
            x = x[rows:]
            if not self._left[0][1]:
                self._left.pop(0)

    def finish(self) -> None:
        """Write the index, with which the part counts."""
        self._writer.finish()


def part_name(group: int) -> str:
    """Return the name of the part that holds the states behind a group."""
    return f"group-{group:05d}"
