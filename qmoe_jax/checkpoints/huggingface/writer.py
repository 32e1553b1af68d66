"""Writes a Hugging Face checkpoint: config.json, and safetensors in one file or in shards with an index."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.checkpoints.huggingface.config import config_json
from qmoe_jax.checkpoints.reader import Reader
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.safetensors_writer import Plan, write_safetensors
from qmoe_jax.parameters import EMBEDDING, is_expert

# What `transformers` cuts checkpoints into by default; hubs upload and resume files of this size well.
SHARD_BYTES = 5_000_000_000
# Experts are read in ranges of at most this, so that a source whose chunks span several is read fewer times.
MEMORY = 2**30


def write_huggingface(
    directory: str | os.PathLike[str],
    reader: Reader,
    *,
    dtype: npt.DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    memory: int = MEMORY,
) -> Path:
    """Writes the model that `reader` reads into `directory`, new or empty, and returns its path.

    Tensors are stored as `dtype` (float32 or bfloat16), by default as they are, in the order of their names.
    Untied models get the copies of their embedding that `transformers` looks for. config.json comes last.

    Memory: the largest tensor that is no expert, or `memory` bytes of experts (at least one), and one tensor
    more. A source whose chunks span more experts than that is read several times, unless it is `staged`.

    Raises:
        CheckpointError: the directory is not empty, or the layers' pattern cannot be said in a config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise CheckpointError("not empty", path=directory, remedy="choose a new directory")
    config = reader.config
    stated = config_json(config, np.dtype(dtype or reader.dtype(EMBEDDING)))
    shards = _shards(_entries(reader, dtype), shard_bytes)
    files = {_file_name(i, len(shards)): shard for i, shard in enumerate(shards)}
    for file, shard in files.items():
        write_safetensors(directory / file, [entry.plan for entry in shard], _arrays(reader, shard, memory))
    if len(shards) > 1:
        total = sum(entry.plan.nbytes for shard in shards for entry in shard)
        weight_map = {entry.plan.key: file for file, shard in files.items() for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", stated)
    return directory


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of the file, and the T5X parameter (of an expert kernel: the expert) that it comes from."""

    plan: Plan
    name: str
    expert: int | None


def _entries(reader: Reader, dtype: npt.DTypeLike | None) -> list[_Entry]:
    entries = []
    for name in reader.names():
        shape, stored = reader.shape(name), np.dtype(dtype or reader.dtype(name))
        if is_expert(name):
            for expert in range(shape[0]):
                plan = Plan(names.to_huggingface(name, expert), stored, shape[:0:-1])
                entries.append(_Entry(plan, name, expert))
            continue
        keys = [names.to_huggingface(name)]
        if name == EMBEDDING and not reader.config.tied:
            keys += names.EMBEDDING_COPIES
        entries += [
            _Entry(Plan(key, stored, shape if name == EMBEDDING else shape[::-1]), name, None) for key in keys
        ]
    return entries


def _arrays(reader: Reader, shard: Sequence[_Entry], memory: int) -> Iterator[np.ndarray]:
    """The values of a shard's tensors in its order: [out, in], in the planned dtype."""
    for name, group in itertools.groupby(shard, key=lambda entry: entry.name):
        entries = list(group)
        step = max(1, memory // max(1, entries[0].plan.nbytes)) if is_expert(name) else len(entries)
        for part in (entries[i : i + step] for i in range(0, len(entries), step)):
            first = part[0].expert
            values = reader.read(name, None if first is None else slice(first, first + len(part)))
            for i, entry in enumerate(part):
                array = values if first is None else values[i]
                yield (array if name == EMBEDDING else array.T).astype(entry.plan.dtype)


def _shards(entries: Sequence[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    """Cuts in order, before the tensor that would make a shard larger than `shard_bytes`."""
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.plan.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.plan.nbytes
    return shards


def _file_name(i: int, count: int) -> str:
    return f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
