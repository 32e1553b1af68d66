"""Writes a ternary model as upstream QMoE publishes its own: same files, keys, dtypes and codewords."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.checkpoints.huggingface.config import config_json
from qmoe_jax.checkpoints.reader import Reader
from qmoe_jax.checkpoints.upstream.reader import CODES, DENSE_FILE, LEVELS, OFFSETS, PLACEHOLDER, SIZES_FILE
from qmoe_jax.coding import encode, upstream_codebook
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.torch_writer import save_torch
from qmoe_jax.parameters import EMBEDDING, STACKS, expert_kernels, is_expert

TernaryMatrix = tuple[UInt8[np.ndarray, "out in"], Float[np.ndarray, "out 2"]]
"""Digits (0: zero, 1: the row's minimum, 2: its maximum), and minimum and maximum of each row."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write_upstream(
    directory: str | os.PathLike[str], reader: Reader, ternary: Callable[[str, int], TernaryMatrix]
) -> Path:
    """Writes the model into `directory`, new or empty, and returns its path.

    All but the experts is taken from `reader`: linear layers rounded to bfloat16, embeddings, norms and
    position biases as they are. `ternary(name, expert)` gives an expert's matrix, whose levels are rounded to
    bfloat16 (ours are already). Memory: the parameters that are no experts, and one layer's codewords.

    Raises:
        CheckpointError: the directory is not empty, or the layers' pattern cannot be said in a config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise CheckpointError("not empty", path=directory, remedy="choose a new directory")
    sizes: dict[str, int] = {}
    for number, kernels in enumerate(_sparse_layers(reader)):
        entries: dict[str, np.ndarray] = {}
        for expert in range(reader.config.num_experts):
            for name in kernels:
                prefix = names.to_huggingface(name, expert).removesuffix(".weight")
                matrix = _matrix_entries(*ternary(name, expert))
                sizes[prefix] = matrix[CODES].size
                entries |= {f"{prefix}.{key}": array for key, array in matrix.items()}
        save_torch(directory / f"exp{number:02}.pt", entries)
    save_torch(directory / DENSE_FILE, _dense_entries(reader))
    save_torch(directory / SIZES_FILE, sizes)
    (directory / "config.json").write_text(
        json.dumps(_config(reader.config), indent=2, sort_keys=True) + "\n"
    )
    return directory


def _sparse_layers(reader: Reader) -> list[list[str]]:
    """The expert kernels of each sparse layer, in the order in which upstream numbers its files."""
    kernels = itertools.groupby(
        expert_kernels(reader.config), key=lambda kernel: (kernel.stack, kernel.layer)
    )
    return [[kernel.path for kernel in layer] for _, layer in kernels]


def _matrix_entries(
    digits: UInt8[np.ndarray, "out in"], levels: Float[np.ndarray, "out 2"]
) -> dict[str, np.ndarray]:
    encoded = encode(digits, upstream_codebook())
    return {
        CODES: np.asarray(encoded.codes).view(np.int16),
        OFFSETS: np.asarray(encoded.row_offsets),
        LEVELS: np.asarray(levels).astype(_BFLOAT16).reshape(-1),
        PLACEHOLDER: np.empty(0, _BFLOAT16),
    }


def _dense_entries(reader: Reader) -> dict[str, np.ndarray]:
    """Every other tensor under its Hugging Face name, [out, in]; the embedding's copies share its storage."""
    entries: dict[str, np.ndarray] = {}
    for name in (name for name in reader.names() if not is_expert(name)):
        array = reader.read(name)
        if name == EMBEDDING:
            entries |= dict.fromkeys((names.EMBEDDING, *names.EMBEDDING_COPIES), array)
        else:
            # Linear layers are T5X's kernels; a position bias is a matrix too, but an embedding to upstream.
            dtype = _BFLOAT16 if name.endswith("/kernel") else array.dtype
            entries[names.to_huggingface(name)] = np.ascontiguousarray(array.T).astype(dtype)
    if reader.config.tied:
        entries[names.HEAD] = entries[names.EMBEDDING].astype(_BFLOAT16)
    return entries


def _config(config: SwitchConfig) -> dict[str, object]:
    # Upstream's reader builds a model without dense layers where this member exists, whatever its value.
    every_layer = all(config.sparse_layers(s) == tuple(range(config.num_layers(s))) for s in STACKS)
    return config_json(config, _BFLOAT16) | ({"is_full_sparse": True} if every_layer else {})
