"""Base class of expert stores: run experts in place on the host, or gather the routed ones for the device."""

from __future__ import annotations

import abc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Int32

from pallas_kernels import PackedMatrix
from pallas_kernels.cpu.mlp import expert_mlp
from qmoe_jax.inference.placement.statistics import ExpertStatistics
from qmoe_jax.parameters import split_matrices

LayerKey = tuple[str, int]
"""Stack ('encoder' or 'decoder') and number of a layer."""

Matrices = Mapping[str, PackedMatrix]
"""An expert's matrices by name: `wi` and `wo`, or `wi_0`, `wi_1` and `wo`; their first axis counts slots."""


T = TypeVar("T")


class ExpertStore(abc.ABC):
    """The packed experts of a model, kept in host memory or read into it when they are routed to.

    Attributes:
        activation: activation between an expert's matrices, "relu" or "gelu".
        statistics: counters of lookups and reads.
        number: key under which compiled programs find the living store (`get_store`).
    """

    def __init__(self, activation: str, statistics: ExpertStatistics):
        self.activation, self.statistics = activation, statistics
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self.number = next(_numbers)
        _stores[self.number] = self

    @abc.abstractmethod
    def _run(
        self,
        layer: LayerKey,
        x: Float32[np.ndarray, "t embed"],
        expert: Int32[np.ndarray, "t"],
        scale: Float32[np.ndarray, "t"],
        y: Float32[np.ndarray, "t embed"],
    ) -> None:
        """Write each token's expert output times its scale to `y`; `expert` must be in range."""

    @abc.abstractmethod
    def _gather(self, layer: LayerKey, experts: Int32[np.ndarray, "n"]) -> Matrices:
        """Return copies of the matrices of `experts`; an expert may be listed more than once."""

    @abc.abstractmethod
    def matrices(self, layer: LayerKey) -> Matrices:
        """Return the stored matrices, which give the shapes, dtypes and codewords of an expert."""

    def run(self, layer: LayerKey, *operands: np.ndarray) -> None:
        """Run a layer's experts, one caller at a time; `raise_store_errors` raises what went wrong."""
        self._guarded(lambda: self._run(layer, *operands))

    def gather(self, layer: LayerKey, experts: Int32[np.ndarray, "n"]) -> Matrices:
        """Return copies of the matrices of `experts`, one caller at a time."""
        return self._guarded(lambda: self._gather(layer, experts))

    def _guarded(self, work: Callable[[], T]) -> T:
        with self._lock:
            try:
                self.statistics.calls += 1
                return work()
            except Exception as error:
                self._failure = error
                raise

    def pop_failure(self) -> Exception | None:
        """Return the last error and forget it."""
        failure, self._failure = self._failure, None
        return failure

    def _multiply(
        self, matrices: Matrices, x: np.ndarray, slot: np.ndarray, scale: np.ndarray, y: np.ndarray
    ) -> None:
        """Multiply tokens by the experts in `slot`, and add up the time."""
        began = time.perf_counter()
        wi, wo = split_matrices(matrices)
        expert_mlp(wi, wo, x, slot, scale, y, activation=self.activation)
        self.statistics.compute_seconds += time.perf_counter() - began


_numbers = itertools.count()
_stores: weakref.WeakValueDictionary[int, ExpertStore] = weakref.WeakValueDictionary()


def get_store(number: int) -> ExpertStore:
    """Return the living store with this number."""
    return _stores[number]


def take_experts(matrices: Matrices, index: Int32[np.ndarray, "n"]) -> Matrices:
    """Return copies of the experts at `index`."""
    return {name: matrix[index] for name, matrix in matrices.items()}
