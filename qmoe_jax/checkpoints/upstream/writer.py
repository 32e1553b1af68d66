"""Writing of ternary models as upstream QMoE publishes its own: same files, keys, dtypes and codewords."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float, UInt8

from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.checkpoints.huggingface.config import config_json
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.upstream.reader import CODES, DENSE_FILE, LEVELS, OFFSETS, PLACEHOLDER, SIZES_FILE
from qmoe_jax.coding import encode, upstream_codebook
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.durable import make_empty_folder, write_json
from qmoe_jax.files.finite import cast
from qmoe_jax.files.torch_writer import save_torch
from qmoe_jax.parameters import EMBEDDING, STACKS, expert_kernels, is_expert
from qmoe_jax.progress import ProgressCallback, no_progress

TernaryMatrix = tuple[UInt8[np.ndarray, "out in"], Float[np.ndarray, "out 2"]]
"""Digits (0: zero, 1: the row's minimum, 2: its maximum), and minimum and maximum of each row."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write_upstream(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    ternary: Callable[[str, int], TernaryMatrix],
    *,
    progress: ProgressCallback = no_progress,
) -> Path:
    """Write a ternary model as an upstream directory, and return its path.

    Memory: the parameters outside the experts, and one layer's codewords.

    Args:
        checkpoint: gives all but the experts: linear layers are rounded to bfloat16; embeddings, norms and
            position biases stay as they are.
        directory: missing or empty.
        ternary: returns the matrix of an expert, given the kernel's name and the expert's number; its levels
            are rounded to bfloat16 (those of our artifacts are already).
        progress: counts expert matrices; its label is the kernel.

    Raises:
        CheckpointError: the directory is not empty, config.json cannot express the pattern of sparse layers,
            or a value overflows in bfloat16.
    """
    directory = make_empty_folder(Path(directory))
    config = _config(checkpoint.config)
    layers = _sparse_layers(checkpoint.config)
    total, done = sum(map(len, layers)) * checkpoint.config.num_experts, itertools.count()
    sizes: dict[str, int] = {}
    for number, kernels in enumerate(layers):
        entries: dict[str, np.ndarray] = {}
        for expert in range(checkpoint.config.num_experts):
            for name in kernels:
                progress(next(done), total, name)
                prefix = names.to_huggingface(name, expert).removesuffix(".weight")
                digits, levels = ternary(name, expert)
                levels = cast(levels, _BFLOAT16, path=checkpoint.path, key=f"{name}, expert {expert}, levels")
                matrix = _matrix_entries(digits, levels)
                sizes[prefix] = matrix[CODES].size
                entries |= {f"{prefix}.{key}": array for key, array in matrix.items()}
        save_torch(directory / f"exp{number:02}.pt", entries)
    save_torch(directory / DENSE_FILE, _dense_entries(checkpoint))
    save_torch(directory / SIZES_FILE, sizes)
    write_json(directory / "config.json", config)
    progress(total, total, "config.json")
    return directory


def _sparse_layers(config: SwitchConfig) -> list[list[str]]:
    """Return the expert kernels of each sparse layer, in the order in which upstream numbers its files."""
    layers = itertools.groupby(expert_kernels(config), key=lambda kernel: (kernel.stack, kernel.layer))
    return [[kernel.path for kernel in kernels] for _, kernels in layers]


def _matrix_entries(
    digits: UInt8[np.ndarray, "out in"], levels: BFloat16[np.ndarray, "out 2"]
) -> dict[str, np.ndarray]:
    encoded = encode(digits, upstream_codebook())
    return {
        CODES: np.asarray(encoded.codes).view(np.int16),
        OFFSETS: np.asarray(encoded.row_offsets),
        LEVELS: levels.reshape(-1),
        PLACEHOLDER: np.empty(0, _BFLOAT16),
    }


def _dense_entries(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return the other tensors under Hugging Face's names, [out, in]; the embedding's copies are views."""
    entries: dict[str, np.ndarray] = {}
    for name in (name for name in checkpoint.names() if not is_expert(name)):
        array = checkpoint.read(name)
        if name == EMBEDDING:
            entries |= dict.fromkeys((names.EMBEDDING, *names.EMBEDDING_COPIES), array)
        else:
            # Linear layers are T5X's kernels; a position bias is a matrix too, but an embedding to upstream.
            dtype = _BFLOAT16 if name.endswith("/kernel") else array.dtype
            array = cast(array, dtype, path=checkpoint.path, key=name)
            entries[names.to_huggingface(name)] = np.ascontiguousarray(array.T)
    if checkpoint.config.tied:
        table = entries[names.EMBEDDING]
        entries[names.HEAD] = cast(table, _BFLOAT16, path=checkpoint.path, key=EMBEDDING)
    return entries


def _config(config: SwitchConfig) -> dict[str, object]:
    # Upstream's reader builds a model without dense layers where this member exists, whatever its value.
    every_layer = all(config.sparse_layers(s) == tuple(range(config.num_layers(s))) for s in STACKS)
    return config_json(config, _BFLOAT16) | ({"is_full_sparse": True} if every_layer else {})
