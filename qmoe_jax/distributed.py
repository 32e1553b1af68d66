"""The mesh of devices that experts and batches are split over, and the processes (hosts) that share a run.

A mesh has one axis, `expert`. Hosts are joined by `jax.distributed`, which tells each its number and has the
barrier; what they exchange are files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

AXIS = "expert"
"""The axis: it splits the experts of each layer, and the rows of each batch."""

BARRIER_SECONDS = 7 * 24 * 3600
"""Seconds that a host waits for the others at a barrier: a slow one is waited for, a dead one ends all."""


def device_mesh(devices: int | Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of devices for `load_compressed` and `load_model`.

    Args:
        devices: the devices, or how many of this process's; None: all of these.

    Raises:
        ValueError: there are fewer devices, none is asked for, or one is listed twice.
    """
    present = jax.local_devices()
    if isinstance(devices, int) and not 1 <= devices <= len(present):
        text = f"devices: expected 1 to {len(present)}, as many as jax sees, found {devices}"
        if present[0].platform == "cpu":
            text += "; for tests, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes a CPU 8 devices"
        raise ValueError(text)
    chosen = present[:devices] if devices is None or isinstance(devices, int) else list(devices)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"devices: expected one or more, each once, found {chosen}")
    return Mesh(np.array(chosen), (AXIS,))


def check_mesh(mesh: Mesh) -> None:
    """Check that a mesh has the one axis `expert`, as `device_mesh` makes it.

    Raises:
        ValueError: it has other axes.
    """
    if mesh.axis_names != (AXIS,):
        raise ValueError(f"mesh: expected the axis {AXIS!r} (device_mesh makes it), found {mesh.axis_names}")


def mesh_of(params: Any) -> Mesh | None:
    """Return the mesh that parameters were loaded for; None for those of one device."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh if sharding.mesh.axis_names == (AXIS,) else None
    return None


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose first axis, experts or rows, is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def split_rows(mesh: Mesh | None, *arrays: Any) -> tuple[Any, ...]:
    """Return arrays with their rows split over the devices; unchanged without a mesh.

    The last row is repeated up to a multiple of the number of devices: the caller drops what comes of it.
    """
    if mesh is None:
        return arrays
    return tuple(jax.device_put(_filled(np.asarray(array), mesh.size), split(mesh)) for array in arrays)


def _filled(array: np.ndarray, multiple: int) -> np.ndarray:
    missing = -len(array) % multiple
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def split_over(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(replicated, *split)` computed on each device of `mesh` with its part of `split`.

    All arrays of `split` and of the result are divided along their first axes; each device runs the program
    that one device alone runs.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(AXIS),
        check_vma=False,
    )


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
