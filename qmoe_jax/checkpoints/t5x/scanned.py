"""Layers trained under `scan`: stored stacked, read one by one under the names of unscanned ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import LazyTensor, Tensor, layer, read_all
from qmoe_jax.parameters import EMBEDDING

# encoder/encoder/subblock_1/mlp/..., encoder/layers/mlp/...: the stacked layers of a stack, in blocks of
# several where dense and sparse ones alternate (flaxformer).
_STACKED = re.compile(r"(encoder|decoder)/(?:layers|encoder|decoder)/(?:subblock_(\d+)/)?(.+)")
_BIAS = "relpos_bias/rel_embedding"


def unscan(tensors: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """Return `tensors` with every stacked one replaced by its layers; the others stay as they are.

    Layers are stacked on axis 1 (flaxformer's choice) or 0: the norms' scales tell which, being [d_model,
    layer] or [layer, d_model]. Scanned layers each carry a position bias; a model here has one per stack, so
    they must be equal.

    Raises:
        CheckpointError: the layers of a stack have different position biases, or a tensor has no layers.
    """
    matches = {name: match for name in tensors if (match := _STACKED.fullmatch(name))}
    unscanned = {name: tensor for name, tensor in tensors.items() if name not in matches}
    axis = _layer_axis(tensors, matches)
    for name, match in matches.items():
        stack, position, rest = match[1], int(match[2] or 0), match[3]
        block = 1 + max(int(other[2] or 0) for other in matches.values() if other[1] == stack)
        layers = _layers(tensors[name], axis, f"{path}/{name}")
        if rest == _BIAS:
            known = unscanned.setdefault(f"{stack}/{_BIAS}", layers[0])
            _require_equal([known, *layers], f"{path}/{name}")
        else:
            unscanned |= {f"{stack}/layers_{i * block + position}/{rest}": t for i, t in enumerate(layers)}
    return unscanned


def _layers(tensor: Tensor, axis: int, path: str) -> list[LazyTensor]:
    if len(tensor.shape) <= axis or not tensor.shape[axis]:
        raise CheckpointError(
            "a scanned tensor without layers",
            path=path,
            expected=f"layers on axis {axis}",
            found=list(tensor.shape),
        )
    return [layer(tensor, axis, i) for i in range(tensor.shape[axis])]


def _layer_axis(tensors: Mapping[str, Tensor], matches: Mapping[str, re.Match[str]]) -> int:
    d_model = tensors[EMBEDDING].shape[-1:]
    scales = [tensors[name].shape for name in matches if name.endswith("_layer_norm/scale")]
    return 0 if scales and scales[0][:1] != d_model else 1


def _require_equal(biases: Sequence[Tensor], path: str) -> None:
    values = [read_all(bias) for bias in biases]
    if not all(np.array_equal(values[0], other) for other in values[1:]):
        raise CheckpointError(
            "layers have different position biases",
            path=path,
            expected="one that all layers of a stack share",
            found="different values",
        )
