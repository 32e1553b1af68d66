"""Compressed models as upstream QMoE publishes them: directories of torch files, experts as codewords.

A directory holds config.json, noexp.pt (everything but the experts, under Hugging Face's names), an
exp<NN>.pt for each sparse layer, and sizes.pt (number of codewords of every matrix). Of a matrix [out, in],
`<name>.w_comp` are the codewords, uint16 under the name of int16, `<name>.row_off` the offsets of its rows,
`<name>.ter_minmax` minimum and maximum of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels import PackedMatrix
from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.checkpoints.huggingface.config import configure, read_stated
from qmoe_jax.checkpoints.huggingface.reader import assemble, is_tied
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.upstream.coded import CodedKernel, CodedMatrix
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location
from qmoe_jax.files.tensor import Shard, Tensor, scaled
from qmoe_jax.files.torch_pickle import TorchTensor, open_torch
from qmoe_jax.parameters import EMBEDDING, LOGITS

DENSE_FILE, SIZES_FILE, EXPERT_FILES = "noexp.pt", "sizes.pt", "exp*.pt"
CODES, OFFSETS, LEVELS, PLACEHOLDER = "w_comp", "row_off", "ter_minmax", "weight"
_KEYS = {CODES: np.dtype(np.int16), OFFSETS: np.dtype(np.int32), LEVELS: np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpstreamReader(Checkpoint):
    """An upstream directory, whose expert kernels come back dequantized, or packed as they are."""

    def packed(self, name: str, experts: slice | None = None) -> PackedMatrix:
        """Return a range of an expert kernel's matrices as `pallas_kernels` takes them, in host memory.

        Raises:
            CheckpointError: the parameter does not exist.
            ValueError: `name` is not an expert kernel.
        """
        kernel = self._tensor(name)
        if not isinstance(kernel, CodedKernel):
            raise ValueError(f"{name} is not an expert kernel")
        return kernel.pack(experts or slice(None))


def open_upstream(location: Location, file: str | None = None) -> UpstreamReader | None:
    """Open an upstream directory; None without a `noexp.pt`. Reads the files' indices, no tensors.

    Upstream keeps a tied model's head at bfloat16 beside an embedding of float32: such a head is a tensor of
    its own here, untied, with the scale of tied models folded in, in float32 (bfloat16 would round the
    published models' scaled values). A note says so.

    Raises:
        CheckpointError: a file is missing, damaged or without tensors, or the matrices do not fit together.
    """
    directory = location.path
    if not isinstance(directory, Path) or not (directory / DENSE_FILE).is_file():
        return None
    stated = read_stated(directory / "config.json")
    stored = _dense(directory / DENSE_FILE)
    tensors = assemble(stored, directory)
    if EMBEDDING not in tensors:
        raise CheckpointError("no embedding", path=directory / DENSE_FILE, key=names.EMBEDDING)
    notes = []
    if is_tied(stored, stated) and LOGITS in tensors:
        head = tensors[LOGITS]
        if head.dtype == tensors[EMBEDDING].dtype:
            del tensors[LOGITS]
        else:
            notes.append(f"the head is stored as {head.dtype}, apart from the embedding")
            tensors[LOGITS] = scaled(head, head.shape[0] ** -0.5)
    tensors |= _kernels(directory, d_model=tensors[EMBEDDING].shape[1])
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config, differences = configure(stated, shapes, directory)
    return UpstreamReader(
        path=directory,
        format="upstream",
        config=config,
        tensors=tensors,
        list_shards=lambda: _shards(directory),
        notes=notes + differences,
    )


def _dense(file: Path) -> dict[str, Tensor]:
    return {key: value for key, value in open_torch(file).items() if isinstance(value, TorchTensor)}


def _kernels(directory: Path, d_model: int) -> dict[str, CodedKernel]:
    """Return the experts of all layers by their keys, as upstream's own reader does, whatever their file."""
    layers: dict[str, dict[int, CodedMatrix]] = {}
    for prefix, matrix in _matrices(directory).items():
        place = names.to_t5x(f"{prefix}.weight")
        if place is None or place.expert is None:
            raise CheckpointError("not an expert of a Switch Transformer", path=directory, key=prefix)
        layers.setdefault(place.name, {})[place.expert] = matrix
    kernels = {}
    for name, experts in layers.items():
        if experts.keys() != set(range(len(experts))):
            raise CheckpointError(
                "experts are not numbered without a gap",
                path=directory,
                key=name,
                expected=f"0 to {len(experts) - 1}",
                found=f"{min(experts)} to {max(experts)}",
            )
        rows = sorted({matrix.rows for matrix in experts.values()})
        if len(rows) > 1:
            raise CheckpointError(
                "experts of one layer differ in their rows", path=directory, key=name, found=rows
            )
        kernels[name] = CodedKernel([experts[e] for e in range(len(experts))], _width(name, layers, d_model))
    return kernels


def _width(name: str, layers: Mapping[str, Mapping[int, CodedMatrix]], d_model: int) -> int:
    """Return the columns of a matrix, which are stored nowhere: those of wo are the rows of wi."""
    if not name.endswith("/wo/kernel"):
        return d_model
    wi = (layers.get(name.replace("/wo/", f"/{matrix}/")) for matrix in ("wi", "wi_0"))
    return next((experts[0].rows for experts in wi if experts and 0 in experts), 0)


def _matrices(directory: Path) -> dict[str, CodedMatrix]:
    """Return all coded matrices by the names before their keys; each whose size is listed must be there."""
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
            expected=f"the {len(sizes)} matrices of {SIZES_FILE}",
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
