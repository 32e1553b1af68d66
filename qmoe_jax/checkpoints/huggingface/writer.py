"""Writing of Hugging Face checkpoints: config.json, and safetensors in one file or in indexed shards."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.checkpoints.huggingface.config import config_json
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.files.durable import make_folder, write_json
from qmoe_jax.files.finite import cast
from qmoe_jax.files.output import new_output_directory
from qmoe_jax.files.safetensors import nbytes, write_safetensors
from qmoe_jax.files.space import require_room
from qmoe_jax.parameters import EMBEDDING, is_expert
from qmoe_jax.progress import ProgressCallback, no_progress

SHARD_BYTES = 5_000_000_000
"""Bytes of tensors per file: the default of `transformers`, and a size that uploads and resumes well."""

MEMORY = 2**30
"""Bytes of experts read at a time, so that a source whose chunks span several experts is read fewer times."""


def write_huggingface(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    *,
    dtype: npt.DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    memory: int = MEMORY,
    progress: ProgressCallback = no_progress,
) -> Path:
    """Write a checkpoint as a Hugging Face directory, and return its path.

    Tensors lie in the order of their T5X names. Untied models get the copies of their embedding that
    `transformers` looks for. config.json comes last.

    Memory: the largest tensor outside the experts, or `memory` bytes of experts (at least one), and one
    tensor more. A source whose chunks span more experts than that is read several times, unless it is
    `staged`.

    Args:
        checkpoint: what to write.
        directory: missing or empty.
        dtype: float32 or bfloat16 to round to; None: as stored.
        shard_bytes: largest size of a file's tensors, in bytes; a single larger tensor has a file of its own.
        memory: see above, in bytes.
        progress: counts the tensors of the files; its label is the parameter.

    Raises:
        CheckpointError: the directory is not empty, config.json cannot express the pattern of sparse layers,
            or a value overflows in `dtype`.
    """
    directory = new_output_directory(directory, inputs=(checkpoint.path,))
    stated = config_json(checkpoint.config, np.dtype(dtype or checkpoint.dtype(EMBEDDING)))
    entries = _entries(checkpoint, dtype)
    require_room(directory, sum(map(nbytes, entries)), wanted=directory)
    make_folder(directory)
    shards = _shards(entries, shard_bytes)
    files = {_file_name(i, len(shards)): shard for i, shard in enumerate(shards)}
    counter = itertools.count()
    report = lambda name: progress(next(counter), len(entries), name)
    for file, shard in files.items():
        arrays = _arrays(checkpoint, shard, memory, report)
        write_safetensors(directory / file, [(entry.key, entry) for entry in shard], arrays)
    if len(shards) > 1:
        weight_map = {entry.key: file for file, shard in files.items() for entry in shard}
        index = {"metadata": {"total_size": sum(map(nbytes, entries))}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "config.json", stated)
    progress(len(entries), len(entries), "config.json")
    return directory


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of a file, and the T5X parameter (of an expert kernel: the expert) that it comes from."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    name: str
    expert: int | None


def _entries(checkpoint: Checkpoint, dtype: npt.DTypeLike | None) -> list[_Entry]:
    entries = []
    for name in checkpoint.names():
        shape, stored = checkpoint.shape(name), np.dtype(dtype or checkpoint.dtype(name))
        if is_expert(name):
            entries += [
                _Entry(names.to_huggingface(name, expert), stored, shape[:0:-1], name, expert)
                for expert in range(shape[0])
            ]
            continue
        keys = [names.to_huggingface(name)]
        if name == EMBEDDING and not checkpoint.config.tied:
            keys += names.EMBEDDING_COPIES
        theirs = shape if name == EMBEDDING else shape[::-1]
        entries += [_Entry(key, stored, theirs, name, None) for key in keys]
    return entries


def _arrays(
    checkpoint: Checkpoint, shard: Sequence[_Entry], memory: int, report: Callable[[str], object]
) -> Iterator[np.ndarray]:
    """Yield the values of a shard's tensors in its order: [out, in], in the entry's dtype."""
    for name, group in itertools.groupby(shard, key=lambda entry: entry.name):
        entries = list(group)
        step = max(1, memory // max(1, nbytes(entries[0]))) if is_expert(name) else len(entries)
        for part in (entries[i : i + step] for i in range(0, len(entries), step)):
            first = part[0].expert
            values = checkpoint.read(name, None if first is None else slice(first, first + len(part)))
            for i, entry in enumerate(part):
                report(name)
                array = values if first is None else values[i]
                key = name if entry.expert is None else f"{name}, expert {entry.expert}"
                array = cast(array, entry.dtype, path=checkpoint.path, key=key)
                yield array if name == EMBEDDING else array.T


def _shards(entries: Sequence[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    """Cut in order, before the tensor that would make a shard larger than `shard_bytes`."""
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + nbytes(entry) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes(entry)
    return shards


def _file_name(i: int, count: int) -> str:
    return f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
