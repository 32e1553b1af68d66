"""A layer's experts as a parameter without arrays: jitted code calls the store that holds them.

`PlacedLayer` stands in the parameter tree as `expert/placed`, in place of the matrices `expert/wi/kernel` and
`expert/wo/kernel`. On a CPU the call goes through XLA's foreign function interface without copies, and the
store multiplies. On an accelerator the store returns the routed experts, packed, and the device multiplies.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import PackedMatrix, packed_mlp
from pallas_kernels.backend import platform
from pallas_kernels.cpu.ffi import HostFunction
from qmoe_jax.inference.placement.store import ExpertStore, LayerKey, get_store
from qmoe_jax.parameters import split_matrices


@jax.tree_util.register_pytree_node_class
class PlacedLayer:
    """The experts of one layer in a store, as a pytree without leaves.

    Compiled programs hold the store weakly: they do not keep it alive.
    """

    def __init__(self, store: ExpertStore, layer: LayerKey):
        self.store, self.layer = store, layer

    def tree_flatten(self) -> tuple[tuple[()], tuple[Any, LayerKey]]:
        """Return no leaves; store (weakly) and layer are static."""
        return (), (weakref.ref(self.store), self.layer)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, LayerKey], children: Any) -> PlacedLayer:
        """Rebuild the parameter from its static part.

        Raises:
            ReferenceError: the store has been garbage-collected.
        """
        reference, layer = aux
        store = reference()
        if store is None:
            raise ReferenceError(
                "the expert store of this model was garbage-collected: keep its parameters while it runs"
            )
        return cls(store, layer)

    def __call__(
        self,
        x: Float[Array, "token embed"],
        expert: Int[Array, "token"],
        scale: Float[Array, "token"],
        *,
        num_experts: int,
    ) -> Float[Array, "token embed"]:
        """Return each token's expert output times `scale`, computed in float32, in the dtype of `x`."""
        index = jnp.clip(expert, 0, num_experts - 1).astype(jnp.int32)
        operands = x.astype(jnp.float32), index, scale.astype(jnp.float32)
        if platform() == "cpu":
            return self._on_host(*operands).astype(x.dtype)
        return self._on_device(*operands, min(len(x), num_experts)).astype(x.dtype)

    def _on_host(self, x: Array, expert: Array, scale: Array) -> Array:
        """Let the store multiply."""
        result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        stack, number = self.layer
        return _run_store(result, x, expert, scale, store=self.store.number, stack=stack, layer=number)

    def _on_device(self, x: Array, expert: Array, scale: Array, count: int) -> Array:
        """Copy the experts of these tokens (at most `count`) to the device, packed, and multiply there."""
        stored = self.store.matrices(self.layer)
        needed, slot = jnp.unique(expert, return_inverse=True, size=count)
        arrays = [(m.codes, m.row_offsets, m.levels) for m in stored.values()]
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), arrays)
        fetch = functools.partial(_gather, self.store.number, self.layer)
        gathered = jax.pure_callback(fetch, shapes, needed, vmap_method="sequential")
        matrices = {
            name: PackedMatrix(codes, offsets, levels, jax.tree.map(jnp.asarray, m.table), m.width)
            for (name, m), (codes, offsets, levels) in zip(stored.items(), gathered, strict=True)
        }
        wide, wo = split_matrices(matrices)
        wi: Any = wide if len(wide) > 1 else wide[0]
        return packed_mlp(wi, wo, x, slot.astype(jnp.int32), scale, self.store.activation)


@HostFunction
def _run_store(x: np.ndarray, expert: np.ndarray, scale: np.ndarray, y: np.ndarray, **static: Any) -> None:
    get_store(static["store"]).run((static["stack"], static["layer"]), x, expert, scale, y)


def _gather(number: int, layer: LayerKey, experts: Array) -> list[tuple[Any, Any, Any]]:
    matrices = get_store(number).gather(layer, np.asarray(experts))
    return [(m.codes, m.row_offsets, m.levels) for m in matrices.values()]


def stores_of(params: Any) -> list[ExpertStore]:
    """Return the distinct stores in a parameter tree."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, PlacedLayer))
    return list({id(leaf.store): leaf.store for leaf in leaves if isinstance(leaf, PlacedLayer)}.values())


@contextmanager
def raise_store_errors(params: Any) -> Iterator[None]:
    """Raise errors of the stores in `params` as they are, instead of the error that XLA wraps them in.

    Results must be waited for (`block_until_ready`) inside the context: errors surface only then.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError:
        for store in stores_of(params):
            if failure := store.pop_failure():
                raise failure from None
        raise
