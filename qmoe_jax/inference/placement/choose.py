"""Where a model's experts should live on this machine: on the device if they fit, else in host memory, else on disk."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from jax import numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.backend import platform
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.checkpoints.params import narrow_dtype, parameter_dtype
from qmoe_jax.inference.placement.source import runs_packed

Placement = Literal["device", "host", "disk"]
"""Where packed experts live."""

SHARE = 0.8
"""Of the memory that is free, what a model may take: the rest is for activations, the compiler, other programs."""

CACHE_SHARE = 0.5
"""Of the memory left beside the dense parameters, what a cache of experts takes: the system's own cache of the same
files makes use of the rest."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A placement, the bytes of a cache for it (None where it needs none), and the reason, for people."""

    placement: Placement
    expert_cache: int | None
    reason: str


def plan_placement(
    reader: ArtifactReader,
    dtype: DTypeLike,
    placement: Placement | None = None,
    expert_cache: int | None = None,
) -> Plan:
    """Completes what the user said (None: nothing) by what fits the memory that is free now."""
    experts = sum(group.record.bytes for group in reader.manifest.groups)
    dense = dense_bytes(reader, dtype)
    free, device = SHARE * available_memory(), device_memory()
    sizes = f"experts {_gb(experts)}, dense parameters {_gb(dense)}"
    if placement is None and not all(map(runs_packed, reader.manifest.kinds.values())):
        return Plan("device", None, "experts that are not ternary with levels a row are dequantized")
    if placement is None and experts + dense <= (free if device is None else SHARE * device):
        return Plan("device", None, f"{sizes}: they fit")
    if placement is None:
        host_has_room = device is not None and experts <= free and dense <= SHARE * device
        placement = "host" if host_has_room else "disk"
    if placement != "disk":
        return Plan(placement, None, sizes)
    if expert_cache is None:
        left = free - (dense if device is None else 0)
        expert_cache = max(0, min(experts, int(CACHE_SHARE * left)))
    return Plan("disk", expert_cache, f"{sizes}, memory free {_gb(free)}: a cache of {_gb(expert_cache)}")


def dense_bytes(reader: ArtifactReader, dtype: DTypeLike) -> int:
    """Bytes of the parameters that do not run packed, held as they are for a computation in `dtype`."""
    narrow, tied = platform() == "cpu", reader.config.tied
    kept = lambda name: (
        narrow_dtype(name, dtype, reader.dtype(name), tied=tied) if narrow else parameter_dtype(name, dtype)
    )
    return sum(
        math.prod(reader.shape(name)) * kept(name).itemsize
        for name in reader.names()
        if not runs_packed(reader.kind(name))
    )


def available_memory() -> int:
    """Bytes of host memory that this process may still take: what is free, or what its control group leaves it."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(fields["MemAvailable"].split()[0])
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def device_memory() -> int | None:
    """Bytes of the default device's own memory that are free; None where it computes in host memory."""
    device = jnp.zeros(()).devices().pop()
    if device.platform == "cpu":
        return None
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
