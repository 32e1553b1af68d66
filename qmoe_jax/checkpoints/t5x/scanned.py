"""Layers trained under `scan`: stored stacked, read one by one under the names of unscanned ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import Tensor

# encoder/encoder/subblock_1/mlp/..., encoder/layers/mlp/...: the stacked layers of a stack, in blocks of
# several where dense and sparse ones alternate (flaxformer).
_STACKED = re.compile(r"(encoder|decoder)/(?:layers|encoder|decoder)/(?:subblock_(\d+)/)?(.+)")
_BIAS = "relpos_bias/rel_embedding"


@dataclasses.dataclass(frozen=True)
class LayerTensor:
    """Layer `index` of a tensor whose axis `axis` (0 or 1) counts layers."""

    stacked: Tensor
    axis: int
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape without the axis of layers."""
        return self.stacked.shape[: self.axis] + self.stacked.shape[self.axis + 1 :]

    @property
    def dtype(self) -> np.dtype:
        """The stored dtype."""
        return self.stacked.dtype

    def read(self, rows: slice) -> np.ndarray:
        """The rows of this layer; with the layers on axis 1, all layers' are read on the way."""
        if self.axis == 0:
            return self.stacked.read(slice(self.index, self.index + 1))[0][rows]
        return self.stacked.read(rows)[:, self.index].copy()


def unscan(tensors: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """`tensors` with every stacked one replaced by its layers; others stay as they are.

    Layers are stacked on axis 1 (flaxformer's choice) or 0: the norms' scales tell which, being [d_model,
    layer] or [layer, d_model]. Scanned layers each carry a position bias; a model here has one a stack, so
    they must be equal.

    Raises:
        CheckpointError: the layers of a stack have different position biases, or a tensor has no layers.
    """
    stacked = {name: match for name in tensors if (match := _STACKED.fullmatch(name))}
    unscanned = {name: tensor for name, tensor in tensors.items() if name not in stacked}
    axis = _layer_axis(tensors, stacked)
    for name, match in stacked.items():
        stack, position, rest = match[1], int(match[2] or 0), match[3]
        block = 1 + max(int(other[2] or 0) for other in stacked.values() if other[1] == stack)
        layers = _layers(tensors[name], axis, f"{path}/{name}")
        if rest == _BIAS:
            known = unscanned.setdefault(f"{stack}/{_BIAS}", layers[0])
            _require_equal([known, *layers], f"{path}/{name}")
        else:
            for i, layer in enumerate(layers):
                unscanned[f"{stack}/layers_{i * block + position}/{rest}"] = layer
    return unscanned


def _layers(tensor: Tensor, axis: int, path: str) -> list[Tensor]:
    if len(tensor.shape) <= axis or not tensor.shape[axis]:
        raise CheckpointError("a scanned tensor without layers", path=path, found=list(tensor.shape))
    return [LayerTensor(tensor, axis, i) for i in range(tensor.shape[axis])]


def _layer_axis(tensors: Mapping[str, Tensor], stacked: Mapping[str, re.Match[str]]) -> int:
    d_model = tensors["token_embedder/embedding"].shape[-1]
    scales = [tensors[name].shape for name in stacked if name.endswith("_layer_norm/scale")]
    return 0 if scales and scales[0][0] != d_model else 1


def _require_equal(biases: list[Tensor], path: str) -> None:
    values = [bias.read(slice(0, bias.shape[0])) for bias in biases]
    if not all(np.array_equal(values[0], other) for other in values[1:]):
        raise CheckpointError(
            "each layer has a position bias of its own",
            path=path,
            expected="one that all layers of a stack share",
            found="different values",
        )
