"""Digests by which a resumed run recognizes its inputs.

Digests are of contents, not of files: a copy of a checkpoint is the same, in another place, of another date
or in another format.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from qmoe_jax.artifact.selection import Selection
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.data import Examples
from qmoe_jax.files.finite import require_finite
from qmoe_jax.files.tensor import ChunkedTensor, Tensor, row_ranges
from qmoe_jax.parameters import ExpertKernel, is_expert

RANGE_BYTES = 1 << 27
"""Bytes of a dense parameter that are read at a time (128 MiB)."""

WHOLE_BYTES = 64 << 30
"""Experts of up to this many bytes are read whole for their digest, whenever a run begins or resumes: all
published models up to switch-base-256, in a minute or so. Of larger ones a sample of that size is read."""


def source_digests(
    reader: Checkpoint, examples: Examples, attachments: Mapping[str, bytes], selection: Selection
) -> dict[str, Any]:
    """Return a digest of each input that decides the bytes of an artifact, by its name in messages.

    Args:
        reader: the checkpoint.
        examples: the calibration samples.
        attachments: files that the artifact carries.
        selection: the layers whose experts are inputs.

    Raises:
        CheckpointError: a parameter cannot be read, or a number outside the experts is not finite.
    """
    digests: dict[str, Any] = {
        "checkpoint": {"dense": dense_digest(reader), "experts": experts_digest(reader, selection.layers)},
        "examples": examples_digest(examples),
    }
    if attachments:
        digests["attachments"] = {n: hashlib.sha256(b).hexdigest() for n, b in sorted(attachments.items())}
    return digests


def dense_digest(reader: Checkpoint) -> str:
    """Return the SHA-256 of every name, shape and dtype, and of the content of all but the experts.

    Memory: `RANGE_BYTES` of rows.

    Raises:
        CheckpointError: a parameter cannot be read, or holds a number that is not finite.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(reader.tensors.items()):
        sha.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        if not is_expert(name):
            for rows in row_ranges(tensor, RANGE_BYTES):
                array = require_finite(tensor.read(rows), path=reader.path, key=name, row=rows.start)
                sha.update(_bytes(array))
    return sha.hexdigest()


def experts_digest(
    reader: Checkpoint,
    layers: Mapping[str, Sequence[int]] | None = None,
    whole_bytes: int = WHOLE_BYTES,
) -> str:
    """Return the SHA-256 of the content of all expert kernels, or beyond `whole_bytes` of a sample of them.

    Of `layers`, by stack, where they are given.

    The sample is an equal number of experts of each kernel, evenly spread; of a kernel whose chunks span
    several experts, the first columns of the first chunks. Disk: up to `whole_bytes` are read, sampled chunks
    with their neighbors. Memory: on each of a few threads one expert's kernel; or a block of experts in as
    many columns as a chunk spans, of one kernel at a time.

    Raises:
        CheckpointError: an expert cannot be read.
    """
    chosen = lambda kernel: layers is None or kernel.layer in layers[kernel.stack]
    kernels = {
        name: tensor
        for name, tensor in sorted(reader.tensors.items())
        if is_expert(name) and chosen(ExpertKernel.parse(name))
    }
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in kernels.values())
    share = None if total <= whole_bytes else whole_bytes // len(kernels)
    sha = hashlib.sha256(b"" if share is None else b"sample")
    # tensorstore decodes the chunks of a block on all cores itself.
    blocks = any(isinstance(t, ChunkedTensor) and t.rows_per_chunk > 1 for t in kernels.values())
    with ThreadPoolExecutor(1 if blocks else min(4, os.cpu_count() or 1)) as pool:
        for name, digest in zip(
            kernels, pool.map(partial(_kernel_digest, share=share), kernels.values()), strict=True
        ):
            sha.update(f"{name} {digest}\n".encode())
    return sha.hexdigest()


def examples_digest(examples: Examples) -> str:
    """Return the SHA-256 of all token ids and lengths."""
    sha = hashlib.sha256()
    for encoder, decoder in examples:
        for ids in (encoder, decoder):
            sha.update(np.int64(len(ids)).tobytes() + np.asarray(ids, "<i4").tobytes())
    return sha.hexdigest()


def _kernel_digest(tensor: Tensor, share: int | None) -> str:
    """Return the SHA-256 of the digests of each expert's kernel; of about `share` bytes where it is given."""
    count, sha = tensor.shape[0], hashlib.sha256()
    if isinstance(tensor, ChunkedTensor) and (span := tensor.rows_per_chunk) > 1:
        for start in range(0, count if share is None else 1, span):
            digests = [hashlib.sha256() for _ in range(start, min(start + span, count))]
            for piece in tensor.read_columns(slice(start, start + len(digests))):
                for digest, values in zip(digests, piece, strict=True):
                    digest.update(_bytes(values))
                if share is not None:
                    break
            for digest in digests:
                sha.update(digest.digest())
        return sha.hexdigest()
    chosen = range(count) if share is None else _spread(count, share // _row_bytes(tensor))
    for expert in chosen:
        sha.update(hashlib.sha256(_bytes(tensor.read(slice(expert, expert + 1)))).digest())
    return sha.hexdigest()


def _spread(count: int, chosen: int) -> list[int]:
    """Return up to `chosen` numbers below `count`, at least two of them, evenly spread from first to last."""
    return sorted(set(np.linspace(0, count - 1, max(chosen, 2)).astype(int).tolist()))


def _row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.dtype.itemsize


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
