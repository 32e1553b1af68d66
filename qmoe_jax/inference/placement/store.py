"""Experts that are no arrays of the program: jitted code calls the store that holds them, wherever that is.

A store stands in the parameter tree as `expert/placed` (`PlacedLayer`, a pytree without leaves) where the matrices
`expert/wi/kernel` and `expert/wo/kernel` would be. On a CPU the call goes through XLA's foreign function interface and
copies nothing; on another platform tokens go to the host and outputs come back, and the host multiplies.
"""

from __future__ import annotations

import abc
import functools
import itertools
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Float32, Int, Int32

from pallas_kernels import PackedMatrix
from pallas_kernels.backend import platform
from pallas_kernels.host.call import HostFunction
from pallas_kernels.host.experts import expert_mlp
from qmoe_jax.inference.placement.statistics import ExpertStatistics

LayerKey = tuple[str, int]
"""Stack ('encoder' or 'decoder') and number of a layer."""

Matrices = Mapping[str, PackedMatrix]
"""An expert's matrices by name: `wi` and `wo`, or `wi_0`, `wi_1` and `wo`; their first axis counts slots."""


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

    def run(self, layer: LayerKey, *operands: np.ndarray) -> None:
        """`_run`, one caller at a time, whose failure `failures_told` will find."""
        with self._lock:
            try:
                self.statistics.calls += 1
                self._run(layer, *operands)
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


@jax.tree_util.register_pytree_node_class
class PlacedLayer:
    """The experts of one layer in a store, as a parameter: a pytree without leaves. Compiled programs do not keep the
    store alive."""

    def __init__(self, store: ExpertStore, layer: LayerKey):
        self.store, self.layer = store, layer

    def tree_flatten(self) -> tuple[tuple[()], tuple[Any, LayerKey]]:
        """For jax."""
        return (), (weakref.ref(self.store), self.layer)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, LayerKey], children: Any) -> PlacedLayer:
        """For jax."""
        reference, layer = aux
        store = reference()
        if store is None:
            raise ReferenceError("the experts of this model were let go: keep its parameters while it runs")
        return cls(store, layer)

    def __call__(
        self,
        x: Float[Array, "token embed"],
        expert: Int[Array, "token"],
        scale: Float[Array, "token"],
        *,
        num_experts: int,
    ) -> Float[Array, "token embed"]:
        """Each token's expert output times `scale`, computed in float32, in the dtype of `x`."""
        result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        index = jnp.clip(expert, 0, num_experts - 1).astype(jnp.int32)
        operands = x.astype(jnp.float32), index, scale.astype(jnp.float32)
        stack, number = self.layer
        if platform() == "cpu":
            y = _on_host(result, *operands, store=self.store.number, stack=stack, layer=number)
        else:
            run = functools.partial(_from_device, self.store.number, self.layer)
            y = jax.pure_callback(run, result, *operands, vmap_method="sequential")
        return y.astype(x.dtype)


@HostFunction
def _on_host(x: np.ndarray, expert: np.ndarray, scale: np.ndarray, y: np.ndarray, **where: Any) -> None:
    _stores[where["store"]].run((where["stack"], where["layer"]), x, expert, scale, y)


def _from_device(number: int, layer: LayerKey, *operands: Array) -> np.ndarray:
    x, expert, scale = map(np.asarray, operands)
    y = np.empty(x.shape, np.float32)
    _stores[number].run(layer, x, expert, scale, y)
    return y


def stores_of(params: Any) -> list[ExpertStore]:
    """The stores that stand in a parameter tree, each once."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, PlacedLayer))
    return list({id(leaf.store): leaf.store for leaf in leaves if isinstance(leaf, PlacedLayer)}.values())


@contextmanager
def failures_told(params: Any) -> Iterator[None]:
    """Inside, what a store of `params` raises comes out as it was, not as the error that XLA makes of it.

    Results must be waited for inside: failures come when they are.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError:
        for store in stores_of(params):
            if failure := store.take_failure():
                raise failure from None
        raise
