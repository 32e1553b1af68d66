"""A layer's experts spread over the devices of a mesh, each device with its own share of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import DecodeTable, PackedMatrix, packed_mlp, pytree
from pallas_kernels.matmul.epilogue import ACTIVATIONS
from qmoe_jax.distributed import AXIS
from qmoe_jax.models.exchange import ExpertRanges, exchanged
from qmoe_jax.models.experts import grouped_mlp

Matrix = PackedMatrix | Float[Array, "expert in out"]
"""A matrix of several experts, packed or dense."""


@pytree.register(leaves=("wi", "wo"), static=("mesh", "activation"))
@dataclasses.dataclass(frozen=True)
class ShardedExperts:
    """The experts of one layer, in place of its matrices as the parameter `expert/placed`.

    Each device holds the experts that `ExpertRanges` gives it, side by side along the arrays' first axis.
    Behind packed ones there is an empty expert (`with_empty_expert`), which costs a kernel nothing: the
    exchange sends it the seats that no token takes.

    Attributes:
        wi: one matrix, or two of gated experts.
        wo: the output matrix.
        mesh: the devices.
        activation: between the matrices, "relu" or "gelu".
    """

    wi: tuple[Matrix, ...]
    wo: Matrix
    mesh: Mesh
    activation: str

    def __call__(
        self,
        x: Float[Array, "token embed"],
        expert: Int[Array, "token"],
        scale: Float[Array, "token"],
        *,
        num_experts: int,
    ) -> Float[Array, "token embed"]:
        """Return each token's expert output times `scale`, in the dtype of `x`.

        Tokens are split over the devices, in order; the last devices get empty ones where they do not divide.
        """
        ranges, tokens = ExpertRanges(num_experts, self.mesh.size), len(x)
        fill = lambda array: jnp.pad(array, [(0, -tokens % self.mesh.size)] + [(0, 0)] * (array.ndim - 1))
        rows = PartitionSpec(AXIS)
        run = jax.shard_map(
            functools.partial(_on_each_device, ranges, self.activation),
            mesh=self.mesh,
            in_specs=(partition((self.wi, self.wo)), rows, rows, rows),
            out_specs=rows,
            check_vma=False,  # kernels are calls that say nothing of it
        )
        index = jnp.clip(expert, 0, num_experts - 1).astype(jnp.int32)
        return run((self.wi, self.wo), fill(x), fill(index), fill(scale))[:tokens]


def with_empty_expert(packed: PackedMatrix) -> PackedMatrix:
    """Return matrices in host memory with one more behind them: zero, since its rows have no codewords."""
    extend = lambda part: np.concatenate([part, np.zeros((1, *part.shape[1:]), part.dtype)])
    return dataclasses.replace(
        packed,
        codes=extend(packed.codes),
        row_offsets=extend(packed.row_offsets),
        levels=extend(packed.levels),
    )


def partition(matrices: Any) -> Any:
    """Return the partition of each array of matrices: by experts, but decode tables whole everywhere."""
    is_table = lambda node: isinstance(node, DecodeTable)
    whole = lambda table: jax.tree.map(lambda _: PartitionSpec(), table)
    return jax.tree.map(
        lambda node: whole(node) if is_table(node) else PartitionSpec(AXIS), matrices, is_leaf=is_table
    )


def _on_each_device(
    ranges: ExpertRanges,
    activation: str,
    matrices: tuple[tuple[Matrix, ...], Matrix],
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    scale: Float[Array, "token"],
) -> Float[Array, "token embed"]:
    """Exchange this device's tokens and run what arrives through its own experts."""
    wi: Any = matrices[0]
    wo = matrices[1]
    run: Callable[[Array, Array, Array], Array]
    if isinstance(wo, PackedMatrix):
        wide = wi if len(wi) > 1 else wi[0]
        run = lambda x, index, scale: packed_mlp(wide, wo, x, index, scale, activation)
    else:
        last = ranges.held - 1  # any expert makes zeros of the zeros of empty seats
        run = lambda x, index, scale: (
            grouped_mlp(x, jnp.minimum(index, last), wi, wo, ACTIVATIONS[activation])
            * scale.astype(x.dtype)[:, None]
        )
    return exchanged(run, x, expert, scale, ranges, AXIS)
