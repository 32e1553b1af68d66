"""T5X checkpoints: its own format (msgpack and zarr), and those that T5X writes through Orbax.

Our parameters carry T5X's names, so reading is the identity on names; what differs between checkpoints is
where the parameter tree hangs (`optimizer/target/`, `target/`, `params/`), and how its leaves are stored.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_jax.checkpoints.architecture import infer_config
from qmoe_jax.checkpoints.reader import DenseReader
from qmoe_jax.checkpoints.t5x import orbax
from qmoe_jax.checkpoints.t5x.scanned import unscan
from qmoe_jax.files import msgpack as flax_msgpack
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location
from qmoe_jax.files.tensor import ArrayTensor, Shard, Tensor
from qmoe_jax.files.zarr import ZarrTensor, open_arrays

_INDEX = "checkpoint"
# The one parameter that every model has: where it hangs, the whole tree does.
_ROOT = "token_embedder/embedding"
# Optimizers keep trees of the parameters' names too; a tree below one of these is theirs.
_OPTIMIZER_STATE = {"state", "opt_state", "param_states"}
# Items that Orbax's managers put a train state in: T5X's, and Orbax's own default.
_ORBAX_ITEMS = ("state", "default")


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a checkpoint is: its directory, and its msgpack index, decoded, if it has one."""

    directory: Location
    index: dict[str, Any] | None


def find_t5x(location: Location) -> Found | None:
    """The checkpoint at `location`: a step's directory or msgpack file, or the last of several steps.

    Raises `CheckpointError` if there is one, but damaged or TensorFlow's.
    """
    is_file = location.path.is_file() if isinstance(location.path, Path) else location.name == _INDEX
    if is_file:
        return _found(location.parent, location.name)
    for directory in (location, *(location / item for item in _ORBAX_ITEMS)):
        if found := _found(directory, _INDEX):
            return found
    steps = [name for name in location.directories() if re.fullmatch(r"(checkpoint_)?\d+", name)]
    return find_t5x(location / max(steps, key=lambda name: int(name.split("_")[-1]))) if steps else None


def open_t5x(path: str | os.PathLike[str]) -> DenseReader:
    """The checkpoint at a local path or URL; `find_t5x` says what may be named.

    Opening reads the index and each array's description: for c-2048 some hundred small files.

    Raises:
        CheckpointError: no checkpoint there, damaged, or not a Switch Transformer.
    """
    location = Location.of(path)
    found = find_t5x(location)
    if found is None:
        raise CheckpointError(
            "no T5X checkpoint", path=path, expected="a file `checkpoint`, or Orbax's `_METADATA`"
        )
    if orbax.is_orbax(found.directory, found.index):
        leaves = orbax.leaves(found.directory, found.index)
        parameters = parameter_tree(leaves, found.directory.path)
        stored = orbax.open_leaves(found.directory, parameters)
    else:
        assert found.index is not None
        parameters = parameter_tree(dict(flax_msgpack.leaves(found.index)), found.directory.path)
        stored = _open_leaves(found.directory, parameters, found.index.get("version"))
    tensors = unscan(stored, found.directory.path)
    config = infer_config({name: tensor.shape for name, tensor in tensors.items()}, found.directory.path)
    return DenseReader(
        path=location.path,
        format="t5x",
        config=config,
        tensors=tensors,
        list_shards=lambda: _shards(found.directory, stored.values()),
    )


def parameter_tree(leaves: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Of a checkpoint's leaves those that are the model's parameters, under their names in the model.

    Raises `CheckpointError` if no tree of parameters is among them.
    """
    prefixes = [name.removesuffix(_ROOT) for name in leaves if f"/{name}".endswith(f"/{_ROOT}")]
    if not prefixes:
        raise CheckpointError(
            "no parameters of a Switch Transformer",
            path=path,
            key=_ROOT,
            expected="an embedding shared by encoder and decoder, somewhere in the tree",
            found=", ".join(list(leaves)[:3]) or "an empty tree",
        )
    is_optimizers = {prefix: not _OPTIMIZER_STATE.isdisjoint(prefix.split("/")) for prefix in prefixes}
    prefix = min(prefixes, key=lambda prefix: (is_optimizers[prefix], len(prefix)))
    parameters = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    # flaxformer may note versions of its layers beside their parameters, under names with underscores around.
    return {name: leaf for name, leaf in parameters.items() if not re.search(r"__\w+__", name)}


def stored_name(name: str) -> str:
    """The directory of a parameter's array: `target.encoder.encoder_norm.scale`."""
    return f"target/{name}".replace("/", ".")


def _found(directory: Location, index: str) -> Found | None:
    data = directory.read(index)
    if data is None:
        return Found(directory, None) if index == _INDEX and orbax.has_metadata(directory) else None
    if data.startswith(b"model_checkpoint_path"):
        raise CheckpointError(
            "a TensorFlow checkpoint",
            path=directory.path,
            key=index,
            expected="the msgpack that T5X writes",
            remedy="convert it with T5X (Checkpointer.convert_from_tf_checkpoint)",
        )
    return Found(directory, flax_msgpack.decode_tree(data, f"{directory.path}/{index}"))


def _open_leaves(directory: Location, parameters: Mapping[str, Any], version: object) -> dict[str, Tensor]:
    """Leaves are specs of arrays in directories beside, or arrays in the msgpack itself."""
    specs = {name: leaf for name, leaf in parameters.items() if flax_msgpack.is_array_spec(leaf)}
    stored = {name: _directory_of(name, spec) for name, spec in specs.items()}
    arrays = open_arrays(
        directory, {stored[name]: spec for name, spec in specs.items()}, uint16_is_bfloat16=version == 2
    )
    return {
        name: arrays[stored[name]] if name in specs else ArrayTensor(np.asarray(leaf))
        for name, leaf in parameters.items()
    }


def _directory_of(name: str, spec: Mapping[str, Any]) -> str:
    """The array's directory beside the index, wherever the spec says that the checkpoint once lay.

    Its path is a member of `kvstore`, or of the spec itself (before tensorstore 0.1.14).
    """
    path = spec["kvstore"].get("path") or spec.get("path") or stored_name(name)
    return path.rstrip("/").rsplit("/", maxsplit=1)[-1]


def _shards(directory: Location, tensors: Iterable[Tensor]) -> list[Shard]:
    """The files of a local checkpoint: its own, and the chunks of the parameters. Of a remote one none."""
    if not isinstance(directory.path, Path):
        return []
    arrays = [tensor for tensor in tensors if isinstance(tensor, ZarrTensor)]
    if all(array.has_chunk_files for array in arrays):
        own = [Shard(file.name, file.stat().st_size) for file in directory.path.iterdir() if file.is_file()]
        return own + [shard for array in arrays for shard in array.shards()]
    files = sorted(file for file in directory.path.rglob("*") if file.is_file())
    return [Shard(str(file.relative_to(directory.path)), file.stat().st_size) for file in files]
