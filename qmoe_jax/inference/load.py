"""Checkpoints and artifacts to a model and its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
from jax.typing import DTypeLike

from qmoe_jax.artifact.files import ArtifactError
from qmoe_jax.artifact.kinds import Ternary
from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.checkpoints.params import read_params
from qmoe_jax.checkpoints.reader import Reader, is_expert
from qmoe_jax.checkpoints.upstream import UpstreamReader
from qmoe_jax.models import CapacityRule, SwitchTransformer

Placement = Literal["device"]
"""Where packed experts live."""


def load_model(
    path: str | Path, dtype: DTypeLike = "float32", *, capacity: CapacityRule | None = None
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """Load a checkpoint of any format with dense experts; a compressed one is dequantized.

    Args:
      path: a T5X, Hugging Face, upstream-QMoE or qmoe directory.
      dtype: of the computation and of all parameters but the router's.
      capacity: what a full expert does with further tokens; None drops none.

    Returns:
      The linen module and its parameters, nested dicts under T5X's names.

    Raises:
      CheckpointError: nothing that can be read is there.
    """
    reader = open_checkpoint(path)
    return SwitchTransformer(reader.config, capacity, dtype), read_params(reader, dtype=dtype)


def _is_packed(reader: Reader, name: str) -> bool:
    """Whether a kernel is stored as the packed kernels take it: ternary, with levels a row."""
    if isinstance(reader, ArtifactReader):
        kind = reader.kind(name)
        return isinstance(kind, Ternary) and kind.group_size is None and not kind.input_scaled
    return isinstance(reader, UpstreamReader) and is_expert(name)


def load_compressed(
    path: str | Path,
    dtype: DTypeLike = "float32",
    experts: Placement = "device",
    *,
    capacity: CapacityRule | None = None,
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """Load a compressed model with its experts packed; also opens upstream QMoE's compressed directories.

    Expert kernels that are ternary with levels a row become `PackedMatrix` values in the parameter tree, decoded
    inside the matmul; those of other kinds (2 to 4 bits, or levels a group) are dequantized.

    Raises:
      CheckpointError: nothing that can be read is there, or it is not compressed.
    """
    if experts != "device":
        raise ValueError(f"experts: expected 'device', found {experts!r}")
    reader = open_checkpoint(path)
    if not isinstance(reader, ArtifactReader | UpstreamReader):
        raise ArtifactError(
            "is not compressed",
            path=path,
            found=f"a {reader.format} checkpoint",
            remedy="open it with load_model",
        )
    packed = [name for name in reader.names() if _is_packed(reader, name)]
    params = read_params(reader, [name for name in reader.names() if name not in packed], dtype)
    for name in packed:
        *folders, leaf = name.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jax.device_put(reader.packed(name))
    return SwitchTransformer(reader.config, capacity, dtype), params
