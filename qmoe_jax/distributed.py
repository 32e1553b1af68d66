"""The devices of this process as a mesh, and the processes (hosts) that share a run.

There is no cluster code here: `jax.distributed` tells each process its number and their count and has the
barrier; what processes exchange are files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

T = TypeVar("T")

AXIS = "expert"
"""Name of the one axis of a mesh, over which experts, and batches, are split."""

BARRIER_SECONDS = 7 * 24 * 3600
"""Seconds that a host waits for the others at a barrier: a slow one is waited for, a dead one ends all."""


def device_mesh(devices: int | Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh over devices of this process, by default all of them.

    Args:
        devices: their number, or the devices themselves.

    Raises:
        ValueError: the process does not have so many.
    """
    local = jax.local_devices()
    if isinstance(devices, int):
        if not 1 <= devices <= len(local):
            raise ValueError(f"devices: expected 1 to {len(local)}, which this process has, found {devices}")
        local = local[:devices]
    elif devices is not None:
        local = list(devices)
    return Mesh(np.array(local), (AXIS,))


def split_over(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(replicated, *split)` computed on each device of `mesh` with its part of `split`.

    All arrays of `split` and of the result are divided along their first axes; each device runs the program
    that one device alone runs.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run.

    Attributes:
        index: number of this process.
        count: number of processes.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Hosts:
        """Return the processes that `jax.distributed.initialize` has joined; one without it."""
        return cls(jax.process_index(), jax.process_count())

    @property
    def first(self) -> bool:
        """True for the process that writes what all share."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's run of consecutive items; the runs of all are the items in order."""
        start, stop = (len(items) * part // self.count for part in (self.index, self.index + 1))
        return items[start:stop]

    def barrier(self, name: str) -> None:
        """Wait until every process has come here; `name` is the same in all, and new at each barrier."""
        if self.count > 1:
            from orbax.checkpoint import multihost

            multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * BARRIER_SECONDS)
