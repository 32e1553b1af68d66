"""Orbax's layouts of a checkpoint: one directory per array, or all arrays in one OCDBT database."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from qmoe_jax.files import msgpack as flax_msgpack
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.foreign import foreign_error
from qmoe_jax.files.location import Location
from qmoe_jax.files.ocdbt import data_files
from qmoe_jax.files.reading import parse_json
from qmoe_jax.files.tensor import Tensor, in_memory
from qmoe_jax.files.zarr import open_arrays, open_zarr3

_METADATA = "_METADATA"
_DATABASE = "manifest.ocdbt"
_STEP_METADATA = "_CHECKPOINT_METADATA"
INDEX_FILES = (_METADATA, _STEP_METADATA, _DATABASE)
"""Orbax's own files, by which its checkpoints may be named."""

# Each process writes a database of its own, which the first merges when all are done.
_PROCESS = re.compile(r"ocdbt\.process_.+")
_FIRST_PROCESS = f"ocdbt.process_0/{_DATABASE}"
# A msgpack leaf whose array lies in the directory named behind the colon.
_PLACEHOLDER = "PLACEHOLDER://"


def has_metadata(directory: Location) -> bool:
    """Return whether Orbax wrote this directory, as far as its own files tell."""
    return any(directory.read(file) is not None for file in (_METADATA, _DATABASE, _FIRST_PROCESS))


def require_committed(directory: Location) -> None:
    """Raise `CheckpointError` if Orbax's own record of a step says that it was not finished."""
    for place in (directory, directory.parent) if directory.name else (directory,):
        data = place.read(_STEP_METADATA)
        if data is None:
            continue
        try:
            times = parse_json(data)
            begun, committed = times.get("init_timestamp_nsecs"), times.get("commit_timestamp_nsecs")
        except (ValueError, AttributeError) as error:
            raise foreign_error(f"{place.path}/{_STEP_METADATA}", data) or CheckpointError(
                "is not metadata that Orbax writes",
                path=f"{place.path}/{_STEP_METADATA}",
                found=repr(error),
                remedy="copy the checkpoint again",
            ) from error
        if begun and not committed:
            raise CheckpointError(
                "is an unfinished step: its writer was interrupted, or still writes",
                path=place.path,
                key=f"{_STEP_METADATA}: commit_timestamp_nsecs",
                expected="the time of its completion",
                found="none",
                remedy="name another step, or the directory of the run, whose newest whole step is read",
            )


def is_orbax(directory: Location, index: Mapping[str, Any] | None) -> bool:
    """Return whether Orbax wrote it: its own files tell, or placeholders in the msgpack of older versions."""
    if index is None or has_metadata(directory):
        return True
    leaves = (leaf for _, leaf in flax_msgpack.leaves(index))
    return any(isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER) for leaf in leaves)


def leaves(directory: Location, index: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return every leaf of the tree: the name of its array's directory, or (in a msgpack only) its value."""
    if metadata := directory.read(_METADATA):
        names = _leaf_names(metadata, f"{directory.path}/{_METADATA}")
        return {name: name.replace("/", ".") for name in names}
    if index is not None:
        return {
            name: leaf.removeprefix(_PLACEHOLDER) if isinstance(leaf, str) else leaf
            for name, leaf in flax_msgpack.leaves(index)
        }
    descriptions = re.compile(r"(.+)/(\.zarray|zarr\.json)")
    keys = (key.decode() for key in _database(directory).store.list().result())
    return {match[1].replace(".", "/"): match[1] for match in map(descriptions.fullmatch, keys) if match}


def open_leaves(directory: Location, parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Open the tensors of `parameters`, some of what `leaves` returns. Raises as `open_arrays` does."""
    root = _database(directory) if _is_database(directory) else directory
    stored = {name: leaf for name, leaf in parameters.items() if isinstance(leaf, str)}
    directories = list(dict.fromkeys(stored.values()))
    zarr3 = directories and root.read(f"{directories[0]}/zarr.json") is not None
    arrays = open_zarr3(root, directories) if zarr3 else open_arrays(root, dict.fromkeys(directories))
    return {
        name: arrays[leaf] if name in stored else in_memory(np.asarray(leaf))
        for name, leaf in parameters.items()
    }


def data_sizes(directory: Location) -> dict[str, int]:
    """Return the data files of a local database, and the bytes that each must have; none without one.

    Raises `CheckpointError` if the database is damaged.
    """
    if not _is_database(directory):
        return {}
    base = _database_base(directory)
    prefix = "" if base == directory else f"{base.name}/"
    return {f"{prefix}{file}": size for file, size in data_files(base).items()}


def _is_database(directory: Location) -> bool:
    return any(directory.read(file) is not None for file in (_DATABASE, _FIRST_PROCESS))


def _leaf_names(metadata: bytes, path: str) -> list[str]:
    try:
        entries = parse_json(metadata)["tree_metadata"].values()
        return ["/".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise foreign_error(path, metadata) or CheckpointError(
            "is not metadata that Orbax writes",
            path=path,
            expected="JSON with tree_metadata",
            found=repr(error),
        ) from error


def _database(directory: Location) -> Location:
    """Return a location that has the database's keys as if they were files in the directory.

    Raises:
        CheckpointError: it cannot be opened, or several processes wrote parts that were not merged.
    """
    spec = {"driver": "ocdbt", "base": _database_base(directory).spec}
    try:
        store = ts.KvStore.open(spec, context=directory.context).result()
    except (ValueError, OSError) as error:
        raise CheckpointError(
            "the OCDBT database cannot be opened", path=directory.path, found=error
        ) from error
    return Location(directory.path, store, directory.context)


def _database_base(directory: Location) -> Location:
    """Return where the database lies: the directory, or the part of its only process if it was not merged."""
    if directory.read(_DATABASE) is not None:
        return directory
    parts = _process_databases(directory)
    if len(parts) > 1:
        raise CheckpointError(
            "the OCDBT databases of its processes are not merged",
            path=directory.path,
            expected=_DATABASE,
            found=", ".join(parts),
            remedy="merge them with Orbax (merge_ocdbt_per_process_files), or name a finished step",
        )
    return directory / parts[0]


def _process_databases(directory: Location) -> list[str]:
    """Return the names of the databases that processes wrote each for itself."""
    names = [name for name in directory.directories() if _PROCESS.fullmatch(name)]
    return [name for name in names if (directory / name).read(_DATABASE) is not None]
