"""Load a model and its parameters from a checkpoint or an artifact."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any, get_args

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pallas_kernels import PackedMatrix
from pallas_kernels.backend import platform
from qmoe_jax.artifact.kinds import runs_packed
from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.checkpoints.params import read_params
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.upstream.reader import UpstreamReader
from qmoe_jax.distributed import check_mesh, replicated
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.placement import (
    DiskExperts,
    ExpertStore,
    HostExperts,
    PlacedLayer,
    PlacedSource,
    Placement,
    PlacementPlan,
    plan_placement,
    read_host_experts,
    read_sharded_experts,
)
from qmoe_jax.inference.placement.store import LayerKey
from qmoe_jax.models import CapacityRule, SwitchTransformer
from qmoe_jax.models.experts import PlacedExperts
from qmoe_jax.parameters import ExpertKernel, is_expert
from qmoe_jax.settings import own_settings


@own_settings()
def load_model(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    dtype: DTypeLike = "float32",
    *,
    capacity: CapacityRule | None = None,
    mesh: Mesh | None = None,
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """Load a checkpoint of any format with dense experts; a compressed one is dequantized.

    Args:
        checkpoint: a T5X, Hugging Face, upstream-QMoE or qmoe directory, by path or opened.
        dtype: dtype of the computation and of all parameters except the router's.
        capacity: rule for tokens beyond an expert's capacity; None drops none.
        mesh: devices that share the experts, as `load_compressed` takes it.

    Returns:
        The linen module and its parameters, nested dicts with T5X's names.

    Raises:
        CheckpointError: no readable checkpoint is there.
        ValueError: the mesh has other axes than `device_mesh` makes.
    """
    reader = open_checkpoint(checkpoint)
    model = SwitchTransformer(reader.config, capacity, dtype)
    if mesh is not None:
        return model, _sharded_params(reader, dtype, mesh, packed=False)
    return model, read_params(reader, dtype=dtype)


@own_settings()
def load_compressed(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    dtype: DTypeLike = "float32",
    experts: Placement | None = "device",
    *,
    expert_cache: int | None = None,
    capacity: CapacityRule | None = None,
    mesh: Mesh | None = None,
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """Load a compressed model with its experts packed; also opens upstream QMoE's compressed directories.

    On the device, expert kernels that are ternary with one pair of levels per row become `PackedMatrix`
    values in the parameter tree, decoded inside the matmul; other kinds (2 to 4 bits, or levels per group)
    are dequantized. In host memory or on disk, the tree holds an `expert/placed` per layer, which calls the
    store that holds the experts; the outputs are the same, also under jit.
    `qmoe_jax.expert_statistics(params)` returns the store's counters.

    Over a mesh, each device holds its share of every layer's experts and all other parameters. `evaluate` and
    `generate` split their batches over the same devices; in each sparse layer tokens travel to the device of
    their expert. A program of the caller's own, `jax.jit(model.apply)`, does the same.

    Args:
        checkpoint: an artifact, or a compressed directory of upstream QMoE, by path or opened.
        dtype: dtype of the computation and of the dense parameters except the router's; on a CPU, dense
            parameters stored in bfloat16 stay so and are widened as they are read.
        experts: placement of the experts. "device": in device memory, as parameters. "host": in host memory,
            never copied to a device. "disk": in the artifact, read when they are routed to. None: the first
            of these that fits.
        expert_cache: bytes of host memory for experts read from disk; by default a share of the available
            memory.
        capacity: rule for tokens beyond an expert's capacity; None drops none.
        mesh: devices that share the experts, from `device_mesh`; None: one device.

    Returns:
        The linen module and its parameters, nested dicts with T5X's names.

    Raises:
        CheckpointError: no readable artifact is there, it is not compressed, or its experts cannot be placed
            so.
        ValueError: the cache is too small for one expert, no number of bytes, or given for experts that are
            not on disk; or a mesh is given for experts that are not on the device, or has other axes than
            `device_mesh` makes.
    """
    if experts not in (None, *get_args(Placement)):
        raise ValueError(f"experts: expected one of {get_args(Placement)} or None, found {experts!r}")
    if expert_cache is not None and not 0 <= expert_cache < math.inf:
        raise ValueError(f"expert_cache: expected a number of bytes, found {expert_cache}")
    if expert_cache is not None and experts in ("device", "host"):
        raise ValueError(f"expert_cache: expected None unless experts are on disk, found experts={experts!r}")
    if mesh is not None and experts in ("host", "disk"):
        raise ValueError(
            f"experts: expected 'device' or None with a mesh, found {experts!r}: a mesh spreads the experts "
            "over the memory of its devices; leave out the mesh to keep them elsewhere"
        )
    reader = open_checkpoint(checkpoint)
    if not isinstance(reader, ArtifactReader | UpstreamReader):
        raise CheckpointError(
            "is not compressed",
            path=reader.path,
            found=f"a {reader.format} checkpoint",
            remedy="open it with load_model",
        )
    model = SwitchTransformer(reader.config, capacity, dtype)
    if mesh is not None:
        return model, _sharded_params(reader, dtype, mesh, packed=True)
    if isinstance(reader, UpstreamReader):
        return model, _upstream_params(reader, dtype, experts)
    plan = plan_placement(reader, dtype, experts, expert_cache)
    return model, _params(reader, dtype, plan)


def _params(reader: ArtifactReader, dtype: DTypeLike, plan: PlacementPlan) -> dict[str, Any]:
    """Return the parameters of an artifact, its experts placed as planned."""
    if plan.placement == "device":
        return _device_params(reader, dtype, [n for n in reader.names() if runs_packed(reader.kind(n))])
    source, activation = PlacedSource.of(reader), reader.config.activation
    if plan.placement == "host":
        store: ExpertStore = read_host_experts(source, activation)
    else:
        assert plan.expert_cache is not None
        store = DiskExperts(source, activation, plan.expert_cache)
    params = _dense_params(reader, dtype, [name for name in reader.names() if reader.kind(name) is None])
    return _with_placed(params, ((key, PlacedLayer(store, key)) for key in source.layers))


def _upstream_params(reader: UpstreamReader, dtype: DTypeLike, experts: Placement | None) -> dict[str, Any]:
    """Return the parameters of an upstream directory, whose files hold all experts of a layer together."""
    packed = [name for name in reader.names() if is_expert(name)]
    if experts in (None, "device"):
        return _device_params(reader, dtype, packed)
    if experts == "disk":
        raise CheckpointError(
            "experts cannot be kept on disk",
            path=reader.path,
            expected="a qmoe artifact, in which each expert is one byte range",
            found="a directory of upstream QMoE",
            remedy="load it with experts='host' or 'device'",
        )
    layers: dict[LayerKey, dict[str, PackedMatrix]] = {}
    for name in packed:
        kernel = ExpertKernel.parse(name)
        layers.setdefault((kernel.stack, kernel.layer), {})[kernel.matrix] = reader.packed(name)
    params = _dense_params(reader, dtype, [name for name in reader.names() if name not in packed])
    store = HostExperts(layers, reader.config.activation)
    return _with_placed(params, ((key, PlacedLayer(store, key)) for key in layers))


def _device_params(
    reader: ArtifactReader | UpstreamReader, dtype: DTypeLike, packed: list[str]
) -> dict[str, Any]:
    """Return parameters with `PackedMatrix` values under the names in `packed`."""
    params = _dense_params(reader, dtype, [name for name in reader.names() if name not in packed])
    for name in packed:
        *folders, leaf = name.split("/")
        _node(params, folders)[leaf] = jax.device_put(reader.packed(name))
    return params


def _sharded_params(reader: Checkpoint, dtype: DTypeLike, mesh: Mesh, *, packed: bool) -> dict[str, Any]:
    """Return parameters over a mesh: experts spread, all else on every device."""
    check_mesh(mesh)
    # Not narrow: the product that widens weights as it reads them runs on one device.
    names = [name for name in reader.names() if not is_expert(name)]
    params = read_params(reader, names, dtype, sharding=replicated(mesh))
    return _with_placed(params, read_sharded_experts(reader, mesh, dtype, packed=packed))


def _dense_params(reader: Checkpoint, dtype: DTypeLike, names: list[str]) -> dict[str, Any]:
    return read_params(reader, names, dtype, narrow=platform() == "cpu")


def _with_placed(params: dict[str, Any], layers: Iterable[tuple[LayerKey, PlacedExperts]]) -> dict[str, Any]:
    """Add the experts of each layer to the parameters."""
    for (stack, number), experts in layers:
        _node(params, [stack, f"layers_{number}", "mlp", "expert"])["placed"] = experts
    return params


def _node(params: dict[str, Any], folders: list[str]) -> dict[str, Any]:
    for folder in folders:
        params = params.setdefault(folder, {})
    return params
