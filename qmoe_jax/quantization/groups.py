"""Groups of columns that share levels, and the schedule by which GPTQ finds their levels."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

Index = TypeVar("Index", int, jax.Array)


def split_groups(x: Shaped[Array, "*row in"], group_size: int) -> Shaped[Array, "*row group {group_size}"]:
    """Return the columns by group; the last group is filled up with zeros."""
    *rows, width = x.shape
    groups = -(-width // group_size)
    padded = jnp.pad(x, [(0, 0)] * len(rows) + [(0, groups * group_size - width)])
    return padded.reshape(*rows, groups, group_size)


def join_groups(x: Shaped[Array, "*row group size"], width: int) -> Shaped[Array, "*row {width}"]:
    """Return the first `width` columns of the groups side by side: the inverse of `split_groups`."""
    *rows, groups, size = x.shape
    return x.reshape(*rows, groups * size)[..., :width]


@dataclasses.dataclass(frozen=True)
class GroupSchedule:
    """The blocks in which GPTQ, going through columns in blocks of `block_size`, finds the levels of groups.

    A group as wide as the matrix gets its levels before the first block. Otherwise, as upstream: when the
    first column of a group is reached, from the weights at the start of that block. A block finds as many
    groups as can begin in any block, from the first that begins in it on; those of them that begin later are
    found again in their own block.
    """

    width: int
    block_size: int
    group_size: int

    @property
    def whole_row(self) -> bool:
        """True if there is only one group."""
        return self.group_size >= self.width

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the matrix."""
        return -(-self.width // self.block_size)

    @property
    def num_groups(self) -> int:
        """Number of groups of the matrix."""
        return -(-self.width // self.group_size)

    @property
    def groups_per_block(self) -> int:
        """Number of groups that a block finds."""
        return -(-self.block_size // self.group_size)

    @property
    def span(self) -> int:
        """Largest number of columns from the start of a block to the end of the last group that it finds."""
        lead = max(
            self.first_group(b) * self.group_size - b * self.block_size for b in self._finding_blocks()
        )
        return lead + self.groups_per_block * self.group_size

    @property
    def padded_width(self) -> int:
        """Number of columns with padding, so that every block and every span lies within."""
        padded_width = self.num_blocks * self.block_size
        if self.whole_row:
            return padded_width
        return max(padded_width, max(self._finding_blocks()) * self.block_size + self.span)

    @property
    def padded_groups(self) -> int:
        """Number of groups with padding, so that all groups that a block finds lie within."""
        return self.first_group(max(self._finding_blocks())) + self.groups_per_block

    def first_group(self, block: Index) -> Index:
        """Return the first group that begins in this block or later."""
        return -(-block * self.block_size // self.group_size)

    def finds_levels(self, block: Index) -> bool | jax.Array:
        """Return True if a group begins in this block."""
        return self.first_group(block) * self.group_size < (block + 1) * self.block_size

    def _finding_blocks(self) -> list[int]:
        return [b for b in range(self.num_blocks) if self.finds_levels(b)]
