"""T5X checkpoints: its own format (msgpack and zarr), and those that T5X writes through Orbax.

Parameters carry T5X's names here, so reading keeps names; what differs between checkpoints is where the
parameter tree hangs (`optimizer/target/`, `target/`, `params/`), and how its leaves are stored.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_jax.checkpoints.architecture import infer_config
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.steps import is_step
from qmoe_jax.checkpoints.t5x import orbax
from qmoe_jax.checkpoints.t5x.scanned import unscan
from qmoe_jax.files import msgpack as flax_msgpack
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location
from qmoe_jax.files.tensor import Shard, Tensor, in_memory
from qmoe_jax.files.zarr import ZarrTensor, open_arrays
from qmoe_jax.parameters import EMBEDDING

_INDEX = "checkpoint"
INDEX_FILES = (_INDEX, *orbax.INDEX_FILES)
"""Files that tell a checkpoint of T5X or of Orbax."""
# Optimizers keep trees of the parameters' names too; a tree below one of these is theirs.
_OPTIMIZER_STATE = {"state", "opt_state", "param_states"}
# Items that a train state is in by convention: T5X's, Orbax's own default, and what users call the rest.
_ITEMS = ("state", "default", "train_state", "params", "model")
# Directories beside an index that are arrays, processes' parts of a database, or hidden.
_NO_ITEM = re.compile(r"target\.|state\.|ocdbt\.|\.|d$")


@dataclasses.dataclass(frozen=True)
class _Step:
    """The directory of one training step, and its msgpack index, decoded, if it has one."""

    directory: Location
    index: dict[str, Any] | None

    @functools.cached_property
    def is_orbax(self) -> bool:
        """True if Orbax wrote it."""
        return orbax.is_orbax(self.directory, self.index)

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """All leaves of the tree, the optimizer's among them."""
        if self.is_orbax:
            return orbax.leaves(self.directory, self.index)
        return dict(flax_msgpack.leaves(self.index or {}))


def open_t5x(location: Location, file: str | None = None) -> Checkpoint | None:
    """Open the directory of a step, or the msgpack `file` in it; None where there is none.

    Reads the index and each array's description: for c-2048 some hundred small files. Nothing is decoded
    twice.

    Raises:
        CheckpointError: a checkpoint is there, but it is damaged, unfinished, TensorFlow's, or not a Switch
            Transformer.
    """
    orbax.require_committed(location)
    step = _find(location, file)
    if step is None:
        return None
    path = step.directory.path
    parameters = parameter_tree(step.leaves, path)
    if step.is_orbax:
        stored = orbax.open_leaves(step.directory, parameters)
    else:
        assert step.index is not None
        stored = _open_leaves(step.directory, parameters, step.index.get("version"))
    tensors = unscan(stored, path)
    return Checkpoint(
        path=location.path,
        format="t5x",
        config=infer_config({name: tensor.shape for name, tensor in tensors.items()}, path),
        tensors=tensors,
        list_shards=lambda: _shards(step.directory, stored.values()),
    )


def parameter_tree(leaves: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Return those leaves of a checkpoint that are the model's parameters, under their names in the model.

    Raises:
        CheckpointError: no tree of parameters is among them.
    """
    # The one parameter that every model has: where it hangs, the whole tree does.
    prefixes = [name.removesuffix(EMBEDDING) for name in leaves if f"/{name}".endswith(f"/{EMBEDDING}")]
    if not prefixes:
        raise CheckpointError(
            "no parameters of a Switch Transformer",
            path=path,
            key=EMBEDDING,
            expected="an embedding shared by encoder and decoder, somewhere in the tree",
            found=", ".join(list(leaves)[:3]) or "an empty tree",
        )
    is_optimizers = {prefix: not _OPTIMIZER_STATE.isdisjoint(prefix.split("/")) for prefix in prefixes}
    prefix = min(prefixes, key=lambda prefix: (is_optimizers[prefix], len(prefix)))
    parameters = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    # flaxformer may note versions of its layers beside their parameters, under names with underscores around.
    return {name: leaf for name, leaf in parameters.items() if not re.search(r"__\w+__", name)}


def stored_name(name: str) -> str:
    """Return the directory of a parameter's array: `target.encoder.encoder_norm.scale`."""
    return f"target/{name}".replace("/", ".")


def _find(location: Location, file: str | None) -> _Step | None:
    if file is not None and file not in INDEX_FILES:
        return _step(location, file)  # a msgpack of any name
    return _step(location, _INDEX) or _item(location)


def _item(location: Location) -> _Step | None:
    """Return the item of an Orbax step that holds the model, whatever its name.

    Raises:
        CheckpointError: several items hold one, and none has a name that T5X or Orbax gives.
    """
    names = [name for name in location.directories() if not _NO_ITEM.match(name) and not is_step(name)]
    names.sort(key=lambda name: (name not in _ITEMS, _ITEMS.index(name) if name in _ITEMS else 0))
    found = {name: step for name in names if (step := _step(location / name, _INDEX))}
    found = {name: step for name, step in found.items() if name in _ITEMS or step.is_orbax}
    models = [name for name, step in found.items() if _holds_model(step.leaves)] or list(found)
    if len(models) > 1 and models[0] not in _ITEMS:
        raise CheckpointError(
            "several items hold a model",
            path=location.path,
            expected=f"one, or one that is named {', '.join(_ITEMS)}",
            found=", ".join(models),
            remedy=f"name one of them, such as {location.path}/{models[0]}",
        )
    return found[models[0]] if models else None


def _holds_model(leaves: Iterable[str]) -> bool:
    return any(f"/{name}".endswith(f"/{EMBEDDING}") for name in leaves)


def _step(directory: Location, index: str) -> _Step | None:
    data = directory.read(index)
    if data is None:
        return _Step(directory, None) if index == _INDEX and orbax.has_metadata(directory) else None
    if data.startswith(b"model_checkpoint_path"):
        raise CheckpointError(
            "a TensorFlow checkpoint",
            path=directory.path,
            key=index,
            expected="the msgpack that T5X writes",
            remedy="convert it with T5X (Checkpointer.convert_from_tf_checkpoint)",
        )
    return _Step(directory, flax_msgpack.decode_tree(data, f"{directory.path}/{index}"))


def _open_leaves(directory: Location, parameters: Mapping[str, Any], version: object) -> dict[str, Tensor]:
    """Open leaves that are specs of arrays in directories beside the index, or arrays in the index itself."""
    specs = {name: leaf for name, leaf in parameters.items() if flax_msgpack.is_array_spec(leaf)}
    stored = {name: _directory_of(name, spec) for name, spec in specs.items()}
    arrays = open_arrays(
        directory, {stored[name]: spec for name, spec in specs.items()}, uint16_is_bfloat16=version == 2
    )
    return {
        name: arrays[stored[name]] if name in specs else in_memory(np.asarray(leaf))
        for name, leaf in parameters.items()
    }


def _directory_of(name: str, spec: Mapping[str, Any]) -> str:
    """Return an array's directory beside the index, wherever the spec says that the checkpoint once lay.

    Its path is a member of `kvstore`, or of the spec itself (before tensorstore 0.1.14).
    """
    kvstore = spec["kvstore"]
    path = (kvstore.get("path") if isinstance(kvstore, dict) else None) or spec.get("path")
    if not isinstance(path, str):
        return stored_name(name)
    return path.rstrip("/").rsplit("/", maxsplit=1)[-1]


def _shards(directory: Location, tensors: Iterable[Tensor]) -> list[Shard]:
    """Return the files of a local checkpoint, its own and the parameters' chunks; of a remote one none."""
    if not isinstance(directory.path, Path):
        return []
    arrays = [tensor for tensor in tensors if isinstance(tensor, ZarrTensor)]
    if all(array.has_chunk_files for array in arrays):
        own = [Shard(file.name, file.stat().st_size) for file in directory.path.iterdir() if file.is_file()]
        return own + [shard for array in arrays for shard in array.shards()]
    files = (file for file in directory.path.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(directory.path)): file.stat().st_size for file in files}
    needed = orbax.data_sizes(directory)
    return [
        Shard(name, size, _too_short(size, needed.get(name, 0)))
        for name, size in sorted({**dict.fromkeys(needed), **sizes}.items())
    ]


def _too_short(size: int | None, needed: int) -> str | None:
    if size is None:
        return "missing"
    return f"cut short: expected at least {needed:,} bytes, found {size:,}" if size < needed else None
