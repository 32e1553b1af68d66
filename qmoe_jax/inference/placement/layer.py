"""A layer's experts as a parameter that is no array: jitted code calls the store that holds them, wherever that is.

`PlacedLayer` stands in the parameter tree as `expert/placed` where the matrices `expert/wi/kernel` and
`expert/wo/kernel` would be. On a CPU the call goes through XLA's foreign function interface, copies nothing, and the
store multiplies. On an accelerator the store hands out the experts that tokens were routed to, packed, and the device
multiplies.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels import PackedMatrix, packed_mlp
from pallas_kernels.backend import platform
from pallas_kernels.cpu.ffi import HostFunction
from qmoe_jax.inference.placement.store import ExpertStore, LayerKey, store_number
from qmoe_jax.parameters import split_matrices


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
        index = jnp.clip(expert, 0, num_experts - 1).astype(jnp.int32)
        operands = x.astype(jnp.float32), index, scale.astype(jnp.float32)
        if platform() == "cpu":
            return self._in_place(*operands).astype(x.dtype)
        return self._handed_out(*operands, min(len(x), num_experts)).astype(x.dtype)

    def _in_place(self, x: Array, expert: Array, scale: Array) -> Array:
        """The store multiplies."""
        result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        stack, number = self.layer
        return _on_host(result, x, expert, scale, store=self.store.number, stack=stack, layer=number)

    def _handed_out(self, x: Array, expert: Array, scale: Array, count: int) -> Array:
        """The device multiplies: the `count` experts of these tokens, at most, come to it packed."""
        stored = self.store.matrices(self.layer)
        needed, slot = jnp.unique(expert, return_inverse=True, size=count)
        arrays = [(m.codes, m.row_offsets, m.levels) for m in stored.values()]
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), arrays)
        fetch = functools.partial(_hand_out, self.store.number, self.layer)
        handed = jax.pure_callback(fetch, shapes, needed, vmap_method="sequential")
        matrices = {
            name: PackedMatrix(*parts, table=jax.tree.map(jnp.asarray, m.table), width=m.width)
            for (name, m), parts in zip(stored.items(), handed, strict=True)
        }
        wide, wo = split_matrices(matrices)
        wi: Any = wide if len(wide) > 1 else wide[0]
        return packed_mlp(wi, wo, x, slot.astype(jnp.int32), scale, self.store.activation)


@HostFunction
def _on_host(x: np.ndarray, expert: np.ndarray, scale: np.ndarray, y: np.ndarray, **where: Any) -> None:
    store_number(where["store"]).run((where["stack"], where["layer"]), x, expert, scale, y)


def _hand_out(number: int, layer: LayerKey, experts: Array) -> list[tuple[Any, Any, Any]]:
    matrices = store_number(number).hand_out(layer, np.asarray(experts))
    return [(m.codes, m.row_offsets, m.levels) for m in matrices.values()]


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
