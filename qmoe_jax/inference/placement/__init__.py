"""Placement of experts: on the device as parameters, spread over devices, or in host memory or on disk."""

from __future__ import annotations

from typing import Any

from qmoe_jax.inference.placement.choose import Placement as Placement
from qmoe_jax.inference.placement.choose import PlacementPlan as PlacementPlan
from qmoe_jax.inference.placement.choose import plan_placement as plan_placement
from qmoe_jax.inference.placement.disk import DiskExperts as DiskExperts
from qmoe_jax.inference.placement.host import HostExperts as HostExperts
from qmoe_jax.inference.placement.host import read_host_experts as read_host_experts
from qmoe_jax.inference.placement.layer import PlacedLayer as PlacedLayer
from qmoe_jax.inference.placement.layer import raise_store_errors as raise_store_errors
from qmoe_jax.inference.placement.layer import stores_of as stores_of
from qmoe_jax.inference.placement.sharded import ShardedExperts as ShardedExperts
from qmoe_jax.inference.placement.shares import read_sharded_experts as read_sharded_experts
from qmoe_jax.inference.placement.source import PlacedSource as PlacedSource
from qmoe_jax.inference.placement.statistics import ExpertStatistics as ExpertStatistics
from qmoe_jax.inference.placement.store import ExpertStore as ExpertStore


def expert_statistics(params: Any) -> ExpertStatistics | None:
    """Return the counters of the store that holds a model's experts, or None for experts on the device.

    The counters are a live object. jax dispatches asynchronously: wait for a call's result before reading
    them.
    """
    stores = stores_of(params)
    return stores[0].statistics if stores else None
