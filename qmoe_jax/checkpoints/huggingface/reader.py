"""Hugging Face checkpoints of Switch Transformers, in safetensors or torch files.

Hugging Face stores kernels [out, in] and each expert by itself; here they are [in, out], with an expert axis
in front. The published config.json of the large models are wrong, so the architecture is inferred from the
tensors; config.json gives what no shape tells, and `notes` says where the two disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.checkpoints.huggingface.config import configure, read_stated
from qmoe_jax.checkpoints.huggingface.weights import open_weights, unread, weights_named
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location
from qmoe_jax.files.names import similar
from qmoe_jax.files.tensor import LazyTensor, Tensor, stacked, transposed
from qmoe_jax.parameters import EMBEDDING, LOGITS

_ROWS = 1024
"""Rows of an embedding that are compared at a time: 3 MB each of the published models'."""


def open_huggingface(location: Location, file: str | None = None) -> Checkpoint | None:
    """Open a local directory with `WEIGHT_FILES` and a config.json; None without weights.

    Reads config.json, an index and the headers of the weight files. No weights, unless the model stores
    copies of its embedding: these are compared.

    Args:
        location: the directory.
        file: the file in it by which the checkpoint was named.

    Raises:
        CheckpointError: a weight file is missing, cut short or damaged, the model is not a Switch
            Transformer, or tensors do not fit together.
    """
    if not isinstance(location.path, Path) or (begin := weights_named(location.path, file)) is None:
        return None
    directory = location.path
    weights, config_file = open_weights(begin), directory / "config.json"
    stated = read_stated(config_file) if config_file.is_file() else {}
    tensors = assemble(weights.tensors, directory)
    if is_tied(weights.tensors, stated):
        tensors.pop(LOGITS, None)
        notes = ignored_copies(weights.tensors)
    else:
        _require_equal_embeddings(weights.tensors, directory)
        notes = []
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config, differences = configure(stated, shapes, directory)
    notes += differences
    if not config_file.is_file():
        other = similar(directory, config_file.name) if directory.is_dir() else None
        but = f" (but {other})" if other else ""
        notes.append(f"no config.json{but}: token ids and activation are T5's")
    return Checkpoint(
        path=directory,
        format="huggingface",
        config=config,
        tensors=tensors,
        list_shards=weights.shards,
        notes=notes + unread(begin, weights),
    )


def assemble(stored: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """Return the stored tensors under T5X's names and in its shapes, a stored head among them, copy or not.

    Raises:
        CheckpointError: a name is not a Switch Transformer's, or an expert is missing or unlike the others.
    """
    tensors: dict[str, Tensor] = {}
    experts: dict[str, dict[int, str]] = {}
    for key in sorted(stored, key=lambda key: key != names.EMBEDDING):  # the embedding before its copies
        place = names.to_t5x(key)
        if place is None:
            raise CheckpointError(
                "a tensor that a Switch Transformer does not have",
                path=path,
                key=key,
                found=list(stored[key].shape),
            )
        if place.expert is not None:
            experts.setdefault(place.name, {})[place.expert] = key
        elif place.name == EMBEDDING:
            tensors.setdefault(EMBEDDING, stored[key])
        else:
            tensors[place.name] = transposed(stored[key]) if len(stored[key].shape) == 2 else stored[key]
    for name, keys in experts.items():
        tensors[name] = _stack(name, keys, stored, path)
    return tensors


def is_tied(stored: Mapping[str, Tensor], stated: Mapping[str, Any]) -> bool:
    """Return whether logits are computed from the embedding: no head is stored, or it is a copy.

    The large models are untied whatever their config.json says, and keep the head under the decoder.
    Otherwise `transformers` overwrites a head with the embedding unless config.json says that they are not
    tied.
    """
    if names.DECODER_HEAD in stored:
        return False
    return names.HEAD not in stored or stated.get("tie_word_embeddings", True)


def _stack(name: str, keys: Mapping[int, str], stored: Mapping[str, Tensor], path: object) -> LazyTensor:
    count = max(keys) + 1
    if missing := sorted(set(range(count)) - keys.keys()):
        key = names.to_huggingface(name, missing[0])
        raise CheckpointError("an expert is missing", path=path, key=key)
    tensors = [stored[keys[expert]] for expert in range(count)]
    kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
    if odd := [expert for expert in range(count) if kinds[expert] != kinds[0]]:
        raise CheckpointError(
            "experts of one layer differ in shape or dtype",
            path=path,
            key=keys[odd[0]],
            expected=f"{kinds[0][1]} {list(kinds[0][0])}, as {keys[0]}",
            found=f"{kinds[odd[0]][1]} {list(kinds[odd[0]][0])}",
        )
    return stacked([transposed(tensor) for tensor in tensors])


def ignored_copies(stored: Mapping[str, Tensor]) -> list[str]:
    """Return a note for each tensor that a tied model should hold as a copy of its embedding, but does not.

    The embedding decides, as in `transformers` before version 5, on which QMoE is built.
    """
    copies = [key for key in (*names.EMBEDDING_COPIES, names.HEAD) if key in stored]
    first = names.EMBEDDING if names.EMBEDDING in stored else next(iter(copies), None)
    return [
        f"{key} differs from {first} and is ignored: the model is tied. transformers ignores it before "
        "version 5 and uses it since; if it is meant, set tie_word_embeddings to false in config.json"
        for key in copies
        if first is not None and key != first and not _equal(stored[first], stored[key])
    ]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same values, or bytes (NaN included). Memory: some rows of each."""
    if a.shape != b.shape:
        return False
    parts = (slice(i, min(i + _ROWS, a.shape[0])) for i in range(0, a.shape[0], _ROWS))
    same = lambda x, y: np.array_equal(x, y) or (x.dtype == y.dtype and x.tobytes() == y.tobytes())
    return all(same(a.read(rows), b.read(rows)) for rows in parts)


def _require_equal_embeddings(stored: Mapping[str, Tensor], path: object) -> None:
    """Raise `CheckpointError` if an untied model stores an embedding per stack and they differ."""
    keys = [key for key in (names.EMBEDDING, *names.EMBEDDING_COPIES) if key in stored]
    for key in keys[1:]:
        if not _equal(stored[keys[0]], stored[key]):
            raise CheckpointError(
                "encoder and decoder have different embeddings",
                path=path,
                key=key,
                expected=f"equal to {keys[0]}",
            )
