"""Choose where to keep a model's experts: on the device if they fit, else in host memory, else on disk."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.backend import platform
from qmoe_jax.artifact.kinds import runs_packed
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.checkpoints.params import narrow_dtype, parameter_dtype
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.placement.disk import smallest_cache
from qmoe_jax.inference.placement.source import PlacedSource
from qmoe_jax.memory import available_memory
from qmoe_jax.models.exchange import ExpertRanges

Placement = Literal["device", "host", "disk"]
"""A place for packed experts."""

SHARE = 0.8
"""Share of available memory that a model may take; activations, compiler and other programs have the rest."""

CACHE_SHARE = 0.5
"""Share of the memory left by the dense parameters that the expert cache takes; the operating system caches
the same files in the rest. The cache holds at least one expert, however little memory there is."""


@dataclasses.dataclass(frozen=True)
class PlacementPlan:
    """A placement and the reason for it.

    Attributes:
        placement: where the experts are kept.
        expert_cache: bytes of the cache for experts on disk, None for other placements.
        reason: the sizes that led to the choice, as text.
    """

    placement: Placement
    expert_cache: int | None
    reason: str


def plan_placement(
    reader: ArtifactReader,
    dtype: DTypeLike,
    placement: Placement | None = None,
    expert_cache: int | None = None,
    devices: int = 1,
) -> PlacementPlan:
    """Fill in unspecified options (None) from the memory that is available now.

    With several `devices`, "device" spreads the experts over them, and each has all dense parameters.

    Memory is measured only if an option depends on it. Reads no more than the manifest and file headers.

    Raises:
        CheckpointError: experts are to be kept on disk, or fit nowhere else, and the artifact is not on one.
    """
    plan = _plan(reader, dtype, placement, expert_cache, devices)
    if plan.placement == "disk" and not isinstance(reader.path, Path):
        raise CheckpointError(
            "experts cannot be read from a URL when tokens are routed to them",
            path=reader.path,
            expected="an artifact on a local disk",
            found=plan.reason,
            remedy="copy the artifact to a local disk, or load it with experts='host' or 'device'",
        )
    return plan


def _plan(
    reader: ArtifactReader,
    dtype: DTypeLike,
    placement: Placement | None,
    expert_cache: int | None,
    devices: int,
) -> PlacementPlan:
    experts = sum(group.record.bytes for group in reader.manifest.groups)
    dense = dense_bytes(reader, dtype)
    sizes = f"experts {_gb(experts)}, dense parameters {_gb(dense)}"
    if placement is None and not all(map(runs_packed, reader.manifest.kinds.values())):
        reason = "experts that are not ternary with one pair of levels per row are dequantized"
        return PlacementPlan("device", None, reason)
    if placement in ("device", "host"):
        return PlacementPlan(placement, None, f"{sizes}: as asked")
    if placement == "disk" and expert_cache is not None:
        return PlacementPlan("disk", expert_cache, f"{sizes}: expert cache of {_gb(expert_cache)}")
    free, device = SHARE * available_memory(), device_memory()
    # The devices that a CPU is made to be share its memory, dense parameters included.
    held = ExpertRanges(reader.config.num_experts, 1 if device is None else devices).held
    share = experts * held / reader.config.num_experts
    if placement is None and share + dense <= (free if device is None else SHARE * device):
        return PlacementPlan("device", None, f"{sizes}: they fit")
    reasons = [sizes] if placement is None else [f"{sizes}: as asked"]
    if placement is None and device is not None:
        reasons.append(_device_refusal(device))
        if experts <= free and dense <= SHARE * device:
            return PlacementPlan(
                "host", None, f"{', '.join(reasons)}, room for experts on the host {_gb(free)}"
            )
    if expert_cache is None:
        left = free - (dense if device is None else 0)
        expert_cache = min(experts, int(CACHE_SHARE * left))
        # Headers are read, and the smallest cache found, only where memory is that short.
        largest = max((group.record.bytes for group in reader.manifest.groups), default=0)
        if expert_cache < 2 * largest * len(reader.layers):
            expert_cache = max(expert_cache, smallest_cache(PlacedSource.of(reader)))
    reasons.append(f"room on the host {_gb(free)}")
    return PlacementPlan("disk", expert_cache, f"{', '.join(reasons)}: expert cache of {_gb(expert_cache)}")


def _device_refusal(memory: int) -> str:
    """Return why the experts are not kept on a device with this much free memory."""
    return f"room on the device {_gb(SHARE * memory)}" if memory else "the device does not report its memory"


def dense_bytes(reader: ArtifactReader, dtype: DTypeLike) -> int:
    """Return the bytes that the parameters which do not run packed take when computing in `dtype`."""
    narrow, tied = platform() == "cpu", reader.config.tied
    kept = lambda name: (
        narrow_dtype(name, dtype, reader.dtype(name), tied=tied) if narrow else parameter_dtype(name, dtype)
    )
    return sum(
        math.prod(reader.shape(name)) * kept(name).itemsize
        for name in reader.names()
        if not runs_packed(reader.kind(name))
    )


def device_memory() -> int | None:
    """Return the free bytes of the default device's memory; None if it computes in host memory.

    0 for a device that does not report its memory.
    """
    device = jnp.zeros(()).devices().pop()
    if device.platform == "cpu":
        return None
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
