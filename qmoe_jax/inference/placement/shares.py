"""Reads each device's share of a layer's experts, so that no host or device holds a whole layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from pallas_kernels import DecodeTable, PackedMatrix
from qmoe_jax.artifact.kinds import runs_packed
from qmoe_jax.artifact.reader import ArtifactReader, ExpertLayer
from qmoe_jax.checkpoints.params import parameter_dtype
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.upstream.reader import UpstreamReader
from qmoe_jax.inference.placement.host import READERS
from qmoe_jax.inference.placement.sharded import Matrix, ShardedExperts, partition, with_empty_expert
from qmoe_jax.inference.placement.slots import SlotLayout, SlotPool
from qmoe_jax.inference.placement.store import LayerKey
from qmoe_jax.models.exchange import ExpertRanges
from qmoe_jax.parameters import STACKS, ExpertKernel, expert_matrices, split_matrices

Share = Mapping[str, PackedMatrix | np.ndarray]
"""The matrices of a device's experts by name, in host memory."""


def read_sharded_experts(
    reader: Checkpoint, mesh: Mesh, dtype: DTypeLike, *, packed: bool
) -> Iterator[tuple[LayerKey, ShardedExperts]]:
    """Yield the experts of each layer, spread over the devices of a mesh.

    Host memory: one device's share of a layer; of a directory of upstream's, a layer.

    Args:
        reader: the checkpoint.
        mesh: the devices.
        dtype: of dense experts.
        packed: keep packed the experts that can run so; else all are dense.

    Raises:
        CheckpointError: experts cannot be read, or hold a number that is not finite.
    """
    config = reader.config
    ranges = ExpertRanges(config.num_experts, mesh.size)
    for stack in STACKS:
        for number in config.sparse_layers(stack):
            shares = _shares(reader, (stack, number), ranges, dtype, packed)
            wi, wo = split_matrices(spread(mesh, shares))
            yield (stack, number), ShardedExperts(wi, wo, mesh, config.activation)


def _shares(
    reader: Checkpoint, key: LayerKey, ranges: ExpertRanges, dtype: DTypeLike, packed: bool
) -> Iterator[Share]:
    """Return each device's matrices, in host memory."""
    names = {matrix: ExpertKernel(*key, matrix).path for matrix in expert_matrices(reader.config)}
    if packed and isinstance(reader, UpstreamReader):
        layer = {matrix: reader.packed(name) for matrix, name in names.items()}
        return (
            {matrix: with_empty_expert(kernel[part]) for matrix, kernel in layer.items()}
            for part in _parts(ranges)
        )
    if packed and isinstance(reader, ArtifactReader) and (tables := _tables(reader, names)) is not None:
        return _packed_shares(reader.layers[key], tables, ranges)
    return (
        {
            matrix: reader.read_finite(name, part, dtype=parameter_dtype(name, dtype))
            for matrix, name in names.items()
        }
        for part in _parts(ranges)
    )


def _parts(ranges: ExpertRanges) -> Iterator[slice]:
    return map(ranges.experts, range(ranges.devices))


def _tables(reader: ArtifactReader, names: Mapping[str, str]) -> dict[str, DecodeTable] | None:
    """Return the decode table of each matrix; None where one does not run packed."""
    tables = {}
    for matrix, name in names.items():
        kind = reader.kind(name)
        if not runs_packed(kind):
            return None
        tables[matrix] = reader.codebooks[kind.codebook].decode_table
    return tables


def _packed_shares(
    layer: ExpertLayer, tables: Mapping[str, DecodeTable], ranges: ExpertRanges
) -> Iterator[Share]:
    """Yield each device's packed matrices, all with room for the longest expert of the layer."""
    longest = SlotLayout.of(layer.files()).matrices
    # Even, since a GPU reads more than 2 GiB of byte codes in pairs.
    layout = SlotLayout(
        {
            name: dataclasses.replace(matrix, capacity=matrix.capacity + matrix.capacity % 2)
            for name, matrix in longest.items()
        }
    )
    with ThreadPoolExecutor(READERS) as readers:
        for part in _parts(ranges):
            pool = SlotPool(layout, ranges.held + 1)  # the last one stays empty
            experts = range(part.start, part.stop)
            reads = [pool.fill(slot, layer.extent(expert)) for slot, expert in enumerate(experts)]
            for _ in readers.map(lambda read: read.complete(), reads):
                pass
            yield pool.packed(tables)


def spread(mesh: Mesh, shares: Iterator[Share]) -> dict[str, Matrix]:
    """Copy each share to its device, and return the arrays over all of them."""
    held = [jax.device_put(share, device) for device, share in zip(mesh.devices.flat, shares, strict=True)]

    def join(spec: PartitionSpec, *parts: jax.Array) -> jax.Array:
        first = parts[0]
        shape = (len(parts) * first.shape[0], *first.shape[1:]) if spec else first.shape
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), list(parts))

    joined: Any = jax.tree.map(join, partition(held[0]), *held)
    return joined
