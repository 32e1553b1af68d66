"""Hugging Face checkpoints of Switch Transformers, in safetensors or torch files.

Hugging Face stores kernels [out, in] and every expert by itself; we have them [in, out], an expert axis in
front. The published config.json of the large models are wrong, so the tensors tell the architecture;
config.json tells what no shape can, and `notes` where the two disagree.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_jax.checkpoints.architecture import infer_config
from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.checkpoints.huggingface.config import contradictions, settings
from qmoe_jax.checkpoints.huggingface.weights import WEIGHT_FILES, find_weights, open_weights, read_json
from qmoe_jax.checkpoints.reader import DenseReader
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import Tensor
from qmoe_jax.parameters import EMBEDDING, LOGITS


@dataclasses.dataclass(frozen=True)
class TransposedTensor:
    """A stored matrix [out, in], seen as [in, out]."""

    stored: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as seen."""
        return self.stored.shape[::-1]

    @property
    def dtype(self) -> np.dtype:
        """The stored dtype."""
        return self.stored.dtype

    def read(self, rows: slice) -> np.ndarray:
        """The rows; the whole stored matrix is read on the way."""
        return np.ascontiguousarray(self.stored.read(slice(0, self.stored.shape[0])).T[rows])


@dataclasses.dataclass(frozen=True)
class ExpertsTensor:
    """Matrices [out, in] of one shape and dtype, one an expert, seen as [expert, in, out]."""

    experts: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as seen."""
        return (len(self.experts), *self.experts[0].shape[::-1])

    @property
    def dtype(self) -> np.dtype:
        """The stored dtype."""
        return self.experts[0].dtype

    def read(self, rows: slice) -> np.ndarray:
        """The experts `rows`, each read by itself: the others are not touched."""
        experts = self.experts[rows]
        array = np.empty((len(experts), *self.shape[1:]), self.dtype)
        for row, expert in zip(array, experts, strict=True):
            row[:] = expert.read(slice(0, expert.shape[0])).T
        return array


def open_huggingface(path: str | os.PathLike[str]) -> DenseReader:
    """The checkpoint in a directory with config.json and weights (`WEIGHT_FILES`), sharded or not.

    Opening reads config.json, an index and the headers of the weight files. No weights, unless an untied
    model stores copies of its embedding: these are compared.

    Raises:
        CheckpointError: no weights there, one missing, cut short or damaged, a model that is no Switch
            Transformer, or tensors that do not fit together.
    """
    directory = Path(path).expanduser()
    file = find_weights(directory)
    if file is None:
        raise CheckpointError("no Hugging Face weights", path=path, expected=" or ".join(WEIGHT_FILES))
    weights, config_file = open_weights(file), directory / "config.json"
    stated = read_json(config_file) if config_file.is_file() else {}
    tensors = assemble(weights.tensors, directory)
    if is_tied(weights.tensors, stated):
        tensors.pop(LOGITS, None)
    else:
        _require_equal_embeddings(weights.tensors, directory)
    gated = any(name.endswith("/wi_0/kernel") for name in tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = infer_config(shapes, directory, **settings(stated, gated=gated, path=config_file))
    return DenseReader(
        path=directory,
        format="huggingface",
        config=config,
        tensors=tensors,
        list_shards=weights.shards,
        notes=contradictions(stated, config) if stated else ["no config.json: ids and activation are T5's"],
    )


def assemble(stored: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """The stored tensors under T5X's names and in its shapes; a stored head is among them, copy or not.

    Raises `CheckpointError` if a name is not a Switch Transformer's, or an expert is missing or unlike the
    others.
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
            tensors[place.name] = (
                TransposedTensor(stored[key]) if len(stored[key].shape) == 2 else stored[key]
            )
    for name, keys in experts.items():
        tensors[name] = _stack(name, keys, stored, path)
    return tensors


def is_tied(stored: Mapping[str, Tensor], stated: Mapping[str, Any]) -> bool:
    """Whether logits are read off the embedding: where no head is stored, or where it is a copy.

    The large models are untied whatever their config.json says, and keep the head under the decoder.
    Otherwise `transformers` overwrites a head with the embedding unless config.json says that they are not
    tied.
    """
    if names.DECODER_HEAD in stored:
        return False
    return names.HEAD not in stored or stated.get("tie_word_embeddings", True)


def _stack(name: str, keys: Mapping[int, str], stored: Mapping[str, Tensor], path: object) -> ExpertsTensor:
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
    return ExpertsTensor(tensors)


def _require_equal_embeddings(stored: Mapping[str, Tensor], path: object) -> None:
    """Untied models may store each stack's embedding: one that differs has no place in the architecture."""
    keys = [key for key in (names.EMBEDDING, *names.EMBEDDING_COPIES) if key in stored]
    for key in keys[1:]:
        first, other = (stored[k].read(slice(0, stored[k].shape[0])) for k in (keys[0], key))
        if not np.array_equal(first, other):
            raise CheckpointError(
                "encoder and decoder have different embeddings",
                path=path,
                key=key,
                expected=f"equal to {keys[0]}",
            )
