"""Where packed experts live: on the device as parameters, or in a store in host memory or on disk that jitted code
calls."""

from __future__ import annotations

from typing import Any

from qmoe_jax.inference.placement.choose import Placement as Placement
from qmoe_jax.inference.placement.choose import Plan as Plan
from qmoe_jax.inference.placement.choose import plan_placement as plan_placement
from qmoe_jax.inference.placement.disk import DiskExperts as DiskExperts
from qmoe_jax.inference.placement.host import HostExperts as HostExperts
from qmoe_jax.inference.placement.host import read_host_experts as read_host_experts
from qmoe_jax.inference.placement.layer import PlacedLayer as PlacedLayer
from qmoe_jax.inference.placement.layer import failures_told as failures_told
from qmoe_jax.inference.placement.layer import stores_of as stores_of
from qmoe_jax.inference.placement.source import PlacedSource as PlacedSource
from qmoe_jax.inference.placement.source import runs_packed as runs_packed
from qmoe_jax.inference.placement.statistics import ExpertStatistics as ExpertStatistics
from qmoe_jax.inference.placement.store import ExpertStore as ExpertStore


def expert_statistics(params: Any) -> ExpertStatistics | None:
    """What the store of a model's experts has done so far (a live object); None where experts are on the device."""
    stores = stores_of(params)
    return stores[0].statistics if stores else None
