"""Layers trained under `scan`: stored stacked, read one by one under the names of unscanned ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from qmoe_jax.checkpoints.reader import CheckpointError, Tensor

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
    stacked = {
        name: match for name in tensors if (match := _STACKED.fullmatch(name)) and "layers_" not in name
    }
    unscanned = {name: tensor for name, tensor in tensors.items() if name not in stacked}
    axis = _layer_axis(tensors, stacked)
    for name, match in stacked.items():
        stack, position, rest = match[1], int(match[2] or 0), match[3]
        block = 1 + max(int(other[2] or 0) for other in stacked.values() if other[1] == stack)
        tensor = tensors[name]
        if len(tensor.shape) <= axis:
            raise CheckpointError(
                "a scanned tensor without an axis of layers", path=path, key=name, found=list(tensor.shape)
            )
        if rest == _BIAS:
            bias = _shared_bias(tensor, axis, f"{path}/{name}")
            known = unscanned.setdefault(f"{stack}/{_BIAS}", bias)
            _require_equal(known, bias, f"{path}/{name}")
            continue
        for i in range(tensor.shape[axis]):
            unscanned[f"{stack}/layers_{i * block + position}/{rest}"] = LayerTensor(tensor, axis, i)
    return unscanned


def _layer_axis(tensors: Mapping[str, Tensor], stacked: Mapping[str, re.Match[str]]) -> int:
    d_model = tensors["token_embedder/embedding"].shape[-1]
    scales = [tensors[name].shape for name in stacked if name.endswith("_layer_norm/scale")]
    return 0 if scales and scales[0][0] != d_model else 1


def _shared_bias(tensor: Tensor, axis: int, path: str) -> Tensor:
    layers = [LayerTensor(tensor, axis, i) for i in range(tensor.shape[axis])]
    for layer in layers[1:]:
        _require_equal(layers[0], layer, path)
    return layers[0]


def _require_equal(a: Tensor, b: Tensor, path: str) -> None:
    rows = slice(0, a.shape[0])
    if a is not b and not np.array_equal(a.read(rows), b.read(rows)):
        raise CheckpointError(
            "each layer has a position bias of its own",
            path=path,
            expected="one that all layers of a stack share",
            found="different values",
        )
