"""What every store of experts does: it runs tokens through them where they are, or hands the experts out."""

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

LayerKey = tuple[str, int]
"""Stack ('encoder' or 'decoder') and number of a layer."""

Matrices = Mapping[str, PackedMatrix]
"""An expert's matrices by name: `wi` and `wo`, or `wi_0`, `wi_1` and `wo`; their first axis counts slots."""


T = TypeVar("T")


class ExpertStore(abc.ABC):
    """The packed experts of a model, in host memory or brought there.

    Attributes:
      activation: what stands between an expert's matrices.
      statistics: what has been asked for and done.
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
        """Writes each token's expert output times its scale to `y`; `expert` is in range."""

    @abc.abstractmethod
    def _hand_out(self, layer: LayerKey, experts: Int32[np.ndarray, "n"]) -> Matrices:
        """The matrices of some experts, copied; one may be named more than once."""

    @abc.abstractmethod
    def matrices(self, layer: LayerKey) -> Matrices:
        """The matrices as the store has them: what shapes, dtypes and codewords an expert has."""

    def run(self, layer: LayerKey, *operands: np.ndarray) -> None:
        """`_run`, one caller at a time, whose failure `failures_told` will find."""
        self._guarded(lambda: self._run(layer, *operands))

    def hand_out(self, layer: LayerKey, experts: Int32[np.ndarray, "n"]) -> Matrices:
        """`_hand_out`, guarded in the same way."""
        return self._guarded(lambda: self._hand_out(layer, experts))

    def _guarded(self, work: Callable[[], T]) -> T:
        with self._lock:
            try:
                self.statistics.calls += 1
                return work()
            except Exception as error:
                self._failure = error
                raise

    def take_failure(self) -> Exception | None:
        """What went wrong last, once."""
        failure, self._failure = self._failure, None
        return failure

    def _multiply(
        self, matrices: Matrices, x: np.ndarray, slot: np.ndarray, scale: np.ndarray, y: np.ndarray
    ) -> None:
        """The experts in some slots on their tokens, timed."""
        began = time.perf_counter()
        wide = tuple(matrices[name] for name in sorted(matrices) if name != "wo")
        expert_mlp(wide, matrices["wo"], x, slot, scale, y, activation=self.activation)
        self.statistics.computed += time.perf_counter() - began


_numbers = itertools.count()
_stores: weakref.WeakValueDictionary[int, ExpertStore] = weakref.WeakValueDictionary()


def store_number(number: int) -> ExpertStore:
    """The living store of a number."""
    return _stores[number]


def picked(matrices: Matrices, index: np.ndarray) -> Matrices:
    """Some of the experts, copied."""
    return {name: matrix[index] for name, matrix in matrices.items()}
