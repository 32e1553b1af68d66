"""The inputs of a compression: dense parameters, and digests by which a resumed run recognizes its inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.data import Examples
from qmoe_jax.parameters import is_expert


def read_dense(reader: Checkpoint) -> dict[str, np.ndarray]:
    """Read every parameter outside the experts, in its stored dtype."""
    return {name: reader.read_finite(name) for name in reader.names() if not is_expert(name)}


def checkpoint_digest(reader: Checkpoint, dense: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of every name, shape and dtype, and of the content of the `dense` parameters.

    Experts are left out because they are nearly all of the bytes; two checkpoints of one shape that agree in
    embeddings, attention, norms and routers are one model.
    """
    sha = hashlib.sha256()
    for name in reader.names():
        sha.update(f"{name} {reader.shape(name)} {reader.dtype(name)}\n".encode())
        if name in dense:
            sha.update(np.ascontiguousarray(dense[name]).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def examples_digest(examples: Examples) -> str:
    """Return the SHA-256 of all token ids and lengths."""
    sha = hashlib.sha256()
    for encoder, decoder in examples:
        for ids in (encoder, decoder):
            sha.update(np.int64(len(ids)).tobytes() + np.asarray(ids, "<i4").tobytes())
    return sha.hexdigest()
