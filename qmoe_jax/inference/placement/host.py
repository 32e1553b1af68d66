"""All experts in host memory, used where they lie: nothing is copied to a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qmoe_jax.inference.placement.slots import SlotLayout, SlotPool
from qmoe_jax.inference.placement.source import PlacedSource
from qmoe_jax.inference.placement.statistics import ExpertStatistics
from qmoe_jax.inference.placement.store import ExpertStore, LayerKey, Matrices, picked

READERS = 8
"""Reads in flight: what keeps a fast disk busy."""


class HostExperts(ExpertStore):
    """Every expert of every layer, read once."""

    def __init__(self, layers: Mapping[LayerKey, Matrices], activation: str):
        """Args: the experts of each layer, as NumPy arrays; what stands between their matrices."""
        nbytes = sum(matrix.nbytes for matrices in layers.values() for matrix in matrices.values())
        super().__init__(activation, ExpertStatistics("host", nbytes))
        self._layers = layers

    def _run(
        self, layer: LayerKey, x: np.ndarray, expert: np.ndarray, scale: np.ndarray, y: np.ndarray
    ) -> None:
        self._count(expert)
        self._multiply(self._layers[layer], x, expert, scale, y)

    def _hand_out(self, layer: LayerKey, experts: np.ndarray) -> Matrices:
        self._count(experts)
        return picked(self._layers[layer], experts)

    def matrices(self, layer: LayerKey) -> Matrices:
        """All experts of a layer."""
        return self._layers[layer]

    def _count(self, experts: np.ndarray) -> None:
        uses = len(np.unique(experts))
        self.statistics.uses += uses
        self.statistics.hits += uses


def read_host_experts(
    source: PlacedSource, activation: str, done: Callable[[LayerKey], object] = lambda layer: None
) -> HostExperts:
    """Reads all experts of an artifact. Memory: the packed experts, each once. Raises as reading an expert does."""
    layers: dict[LayerKey, Matrices] = {}
    with ThreadPoolExecutor(READERS) as readers:
        for key, layer in source.layers.items():
            pool = SlotPool(SlotLayout.of(layer.files()), layer.num_experts)
            reads = [pool.fill(expert, layer.extent(expert)) for expert in range(layer.num_experts)]
            for _ in readers.map(lambda read: read.complete(), reads):
                pass
            layers[key] = pool.packed(source.tables[key])
            done(key)
    return HostExperts(layers, activation)
