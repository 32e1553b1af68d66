"""The steps of a walk over a model: an attention pass up to the next layer with experts, then its experts."""

from __future__ import annotations

import dataclasses

from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.config import SwitchConfig


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a walk.

    Attributes:
        stack: "encoder" or "decoder".
        dense: layers without experts in front of it, run whole.
        sparse: the layer with experts; None for the end of the encoder.
        last: true where nothing comes behind, so that the outputs of the experts are not needed.
    """

    stack: str
    dense: tuple[int, ...]
    sparse: int | None
    last: bool = False

    @property
    def name(self) -> str:
        """Name of the step in progress bars, logs and plans."""
        return f"{self.stack}'s end" if self.sparse is None else f"{self.stack} layer {self.sparse}"

    @property
    def folder(self) -> str:
        """Name of the step's hidden states."""
        return f"{self.stack}.end" if self.sparse is None else f"{self.stack}.layers_{self.sparse:02d}"


def steps_of(model: SwitchConfig, config: CompressionConfig) -> list[Step]:
    """Return the steps of a walk: up to the last layer that is compressed."""
    selection = config.selection(model)
    steps: list[Step] = []
    stacks = ("encoder", "decoder") if "decoder" in config.compressed_stacks else ("encoder",)
    for stack in stacks:
        dense: list[int] = []
        for layer in selection.layers[stack]:
            if layer in model.sparse_layers(stack):
                steps.append(Step(stack, tuple(dense), layer))
                dense = []
            else:
                dense.append(layer)
        if stack != stacks[-1]:
            steps.append(Step(stack, tuple(dense), None))
    compressed = lambda step: step.sparse is not None and step.stack in config.compressed_stacks
    while not compressed(steps[-1]):
        steps.pop()
    return [*steps[:-1], dataclasses.replace(steps[-1], last=True)]
