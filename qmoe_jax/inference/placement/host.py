"""All experts in host memory, multiplied in place: nothing is copied to a device."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qmoe_jax.inference.placement.slots import SlotLayout, SlotPool
from qmoe_jax.inference.placement.source import PlacedSource
from qmoe_jax.inference.placement.statistics import ExpertStatistics
from qmoe_jax.inference.placement.store import ExpertStore, LayerKey, Matrices, take_experts

READERS = 8
"""Reader threads: enough parallel requests to keep a fast disk busy."""


class HostExperts(ExpertStore):
    """The experts of all layers, each read once."""

    def __init__(self, layers: Mapping[LayerKey, Matrices], activation: str):
        """Keep `layers`, the packed experts of each layer as NumPy arrays.

        Args:
            layers: packed matrices by name for each layer.
            activation: activation between an expert's matrices, "relu" or "gelu".
        """
        nbytes = sum(matrix.nbytes for matrices in layers.values() for matrix in matrices.values())
        super().__init__(activation, ExpertStatistics("host", nbytes))
        self._layers = layers

    def _run(
        self, layer: LayerKey, x: np.ndarray, expert: np.ndarray, scale: np.ndarray, y: np.ndarray
    ) -> None:
        self._count(expert)
        self._multiply(self._layers[layer], x, expert, scale, y)

    def _gather(self, layer: LayerKey, experts: np.ndarray) -> Matrices:
        self._count(experts)
        return take_experts(self._layers[layer], experts)

    def matrices(self, layer: LayerKey) -> Matrices:
        """Return all experts of a layer."""
        return self._layers[layer]

    def _count(self, experts: np.ndarray) -> None:
        lookups = len(np.unique(experts))
        self.statistics.lookups += lookups
        self.statistics.hits += lookups


def read_host_experts(source: PlacedSource, activation: str) -> HostExperts:
    """Read all experts of an artifact into host memory.

    Memory: the packed experts, once.

    Raises:
        CheckpointError: a file is missing, cut short or damaged.
    """
    layers: dict[LayerKey, Matrices] = {}
    with ThreadPoolExecutor(READERS) as readers:
        for key, layer in source.layers.items():
            pool = SlotPool(SlotLayout.of(layer.files()), layer.num_experts)
            reads = [pool.fill(expert, layer.extent(expert)) for expert in range(layer.num_experts)]
            for _ in readers.map(lambda read: read.complete(), reads):
                pass
            layers[key] = pool.packed(source.tables[key])
    return HostExperts(layers, activation)
