"""Compressed models as upstream QMoE publishes them: its dictionary's codewords, an expert's matrix under a
few keys.

A directory holds config.json, noexp.pt (everything but the experts, under Hugging Face's names), an
exp<NN>.pt for each sparse layer, and sizes.pt (codewords of every matrix). Of a matrix [out, in]
`<name>.w_comp` are the codewords, uint16 under the name of int16, `<name>.row_off` the offsets of its rows,
`<name>.ter_minmax` minimum and maximum of each.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels import PackedMatrix
from qmoe_jax.checkpoints.architecture import infer_config
from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.checkpoints.huggingface.config import contradictions, settings
from qmoe_jax.checkpoints.huggingface.reader import assemble, is_tied
from qmoe_jax.checkpoints.huggingface.weights import read_json
from qmoe_jax.checkpoints.reader import DenseReader
from qmoe_jax.checkpoints.upstream.coded import CodedKernel, CodedMatrix
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import Shard, Tensor
from qmoe_jax.files.torch_pickle import TorchTensor, open_torch
from qmoe_jax.parameters import EMBEDDING, LOGITS

DENSE_FILE, SIZES_FILE, EXPERT_FILES = "noexp.pt", "sizes.pt", "exp*.pt"
CODES, OFFSETS, LEVELS, PLACEHOLDER = "w_comp", "row_off", "ter_minmax", "weight"
_KEYS = {CODES: np.dtype(np.int16), OFFSETS: np.dtype(np.int32), LEVELS: np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class ScaledHead:
    """A tied model's head that is stored apart from its embedding, as the head of an untied one: scaled,
    float32."""

    stored: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[d_model, vocabulary]."""
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        """float32: bfloat16 has no room for the scaled values of the published models."""
        return np.dtype(np.float32)

    def read(self, rows: slice) -> np.ndarray:
        """The rows, times d_model^-1/2."""
        return self.stored.read(rows).astype(np.float32) * np.float32(self.shape[0] ** -0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpstreamReader(DenseReader):
    """An upstream directory: a `Reader` whose expert kernels come back dequantized, or packed as they are."""

    def packed(self, name: str, experts: slice | None = None) -> PackedMatrix:
        """A range of an expert kernel's matrices as `pallas_kernels` takes them, in host memory.

        Raises `ValueError` if `name` is no expert kernel.
        """
        kernel = self._tensor(name)
        if not isinstance(kernel, CodedKernel):
            raise ValueError(f"{name} is no expert kernel")
        return kernel.pack(experts or slice(None))


def open_upstream(path: str | os.PathLike[str]) -> UpstreamReader:
    """The compressed model in an upstream directory. Opening reads the files' directories, no tensors.

    Upstream keeps a tied model's head at bfloat16 beside an embedding of float32: such a head is a tensor of
    its own here, untied, with the scale of tied models folded in. A note says so.

    Raises:
        CheckpointError: a file is missing, damaged or no tensors, or the matrices do not fit together.
    """
    directory = Path(path).expanduser()
    stated = read_json(directory / "config.json")
    stored = _dense(directory / DENSE_FILE)
    tensors = assemble(stored, directory)
    if EMBEDDING not in tensors:
        raise CheckpointError("no embedding", path=directory / DENSE_FILE, key=names.EMBEDDING)
    notes = []
    if is_tied(stored, stated) and LOGITS in tensors:
        if tensors[LOGITS].dtype == tensors[EMBEDDING].dtype:
            del tensors[LOGITS]
        else:
            notes.append(f"the head is stored as {tensors[LOGITS].dtype}, apart from the embedding")
            tensors[LOGITS] = ScaledHead(tensors[LOGITS])
    tensors |= _kernels(directory, d_model=tensors[EMBEDDING].shape[1])
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    gated = any(name.endswith("/wi_0/kernel") for name in tensors)
    config = infer_config(shapes, directory, **settings(stated, gated=gated, path=directory / "config.json"))
    return UpstreamReader(
        path=directory,
        format="upstream",
        config=config,
        tensors=tensors,
        list_shards=lambda: _shards(directory),
        notes=notes + contradictions(stated, config),
    )


def _dense(file: Path) -> dict[str, Tensor]:
    return {key: value for key, value in open_torch(file).items() if isinstance(value, TorchTensor)}


def _kernels(directory: Path, d_model: int) -> dict[str, CodedKernel]:
    """The experts of all layers, whichever file they lie in: upstream's own reader goes by the keys too."""
    layers: dict[str, dict[int, CodedMatrix]] = {}
    for prefix, matrix in _matrices(directory).items():
        place = names.to_t5x(f"{prefix}.weight")
        if place is None or place.expert is None:
            raise CheckpointError("no expert of a Switch Transformer", path=directory, key=prefix)
        layers.setdefault(place.name, {})[place.expert] = matrix
    kernels = {}
    for name, experts in layers.items():
        if experts.keys() != set(range(len(experts))):
            raise CheckpointError("experts are not numbered without a gap", path=directory, key=name)
        if len({matrix.rows for matrix in experts.values()}) > 1:
            raise CheckpointError("experts of one layer differ in their rows", path=directory, key=name)
        kernels[name] = CodedKernel([experts[e] for e in range(len(experts))], _width(name, layers, d_model))
    return kernels


def _width(name: str, layers: Mapping[str, Mapping[int, CodedMatrix]], d_model: int) -> int:
    """The columns of a matrix, stored nowhere: those of wo are the rows of wi."""
    if not name.endswith("/wo/kernel"):
        return d_model
    wi = (layers.get(name.replace("/wo/", f"/{matrix}/")) for matrix in ("wi", "wi_0"))
    return next((experts[0].rows for experts in wi if experts and 0 in experts), 0)


def _matrices(directory: Path) -> dict[str, CodedMatrix]:
    """All coded matrices by the names before their keys. None may be missing whose size is kept."""
    sizes = open_torch(directory / SIZES_FILE)
    parts: dict[str, dict[str, TorchTensor]] = {}
    for file in sorted(directory.glob(EXPERT_FILES)):
        for key, tensor in open_torch(file).items():
            prefix, _, part = key.rpartition(".")
            if part != PLACEHOLDER:
                parts.setdefault(prefix, {})[part] = tensor
    if missing := sorted(sizes.keys() - parts.keys()):
        raise CheckpointError(
            "an expert file is missing",
            path=directory,
            key=missing[0],
            expected=f"{len(sizes)} matrices, as {SIZES_FILE} says",
            found=len(parts),
            remedy="download it again",
        )
    return {prefix: _matrix(directory, prefix, found, sizes.get(prefix)) for prefix, found in parts.items()}


def _matrix(directory: Path, prefix: str, parts: Mapping[str, Any], size: int | None) -> CodedMatrix:
    expected = {
        CODES: (size,),
        OFFSETS: parts[OFFSETS].shape if OFFSETS in parts else None,
        LEVELS: (2 * parts[OFFSETS].shape[0] - 2,) if OFFSETS in parts else None,
    }
    for part, dtype in _KEYS.items():
        tensor = parts.get(part)
        if not isinstance(tensor, TorchTensor) or (tensor.dtype, tensor.shape) != (dtype, expected[part]):
            raise CheckpointError(
                "a coded matrix that is not as upstream writes it",
                path=directory,
                key=f"{prefix}.{part}",
                expected=f"{dtype} {expected[part]}",
                found=f"{tensor.dtype} {tensor.shape}" if isinstance(tensor, TorchTensor) else tensor,
            )
    return CodedMatrix(parts[CODES], parts[OFFSETS], parts[LEVELS])


def _shards(directory: Path) -> list[Shard]:
    experts = sorted(file.name for file in directory.glob(EXPERT_FILES))
    files = ["config.json", DENSE_FILE, SIZES_FILE, *experts]
    return [Shard(name, (directory / name).stat().st_size) for name in files]
