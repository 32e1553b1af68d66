"""Names of a Switch Transformer's parameters as T5X writes them; only this module builds and parses them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from qmoe_jax.config import SwitchConfig

T = TypeVar("T")

STACKS = ("encoder", "decoder")

EMBEDDING = "token_embedder/embedding"
LOGITS = "decoder/logits_dense/kernel"
"""Output projection of models that are not tied; tied models read their logits off the embedding."""

_EXPERTS = "/mlp/expert/"
_EXPERT_KERNEL = re.compile(r"(encoder|decoder)/layers_(\d+)/mlp/expert/(wi|wi_0|wi_1|wo)/kernel")


@dataclasses.dataclass(frozen=True, order=True)
class ExpertKernel:
    """One matrix of all experts of a layer, stored as `[expert, in, out]`.

    Attributes:
        stack: "encoder" or "decoder".
        layer: number of the layer within its stack.
        matrix: "wi" and "wo", or "wi_0", "wi_1" and "wo" for gated experts.
    """

    stack: str
    layer: int
    matrix: str

    @property
    def path(self) -> str:
        """Name in the parameter tree, such as `encoder/layers_3/mlp/expert/wi/kernel`."""
        return f"{self.stack}/layers_{self.layer}{_EXPERTS}{self.matrix}/kernel"

    @classmethod
    def parse(cls, name: str) -> ExpertKernel:
        """Return the kernel that `name` stands for.

        Raises:
            ValueError: `name` is not the name of an expert kernel.
        """
        match = _EXPERT_KERNEL.fullmatch(name)
        if match is None:
            raise ValueError(
                f"expected the name of an expert kernel, such as {cls('encoder', 0, 'wi').path}, "
                f"found {name!r}"
            )
        return cls(match[1], int(match[2]), match[3])


def is_expert(name: str) -> bool:
    """Return whether a parameter belongs to experts; its first axis then is `expert`."""
    return _EXPERTS in name


def sparse_layers(names: Iterable[str], stack: str) -> tuple[int, ...]:
    """Return the layers of `stack` that have experts among the parameters `names`."""
    matches = map(re.compile(rf"{stack}/layers_(\d+){_EXPERTS}").match, names)
    return tuple(sorted({int(match[1]) for match in matches if match}))


def input_matrices(config: SwitchConfig) -> tuple[str, ...]:
    """Return the names of an expert's matrices `[d_model, d_ff]`: one, or two where experts are gated."""
    return ("wi_0", "wi_1") if config.gated else ("wi",)


def expert_matrices(config: SwitchConfig) -> tuple[str, ...]:
    """Return the names of an expert's matrices, the output matrix `wo` last."""
    return (*input_matrices(config), "wo")


def expert_shapes(config: SwitchConfig) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of each matrix of an expert."""
    shapes = dict.fromkeys(input_matrices(config), (config.d_ff, config.d_model))
    return {**shapes, "wo": (config.d_model, config.d_ff)}


def expert_kernels(config: SwitchConfig, stacks: Sequence[str] = STACKS) -> Iterator[ExpertKernel]:
    """Yield every expert kernel of `stacks`, layer by layer."""
    for stack in stacks:
        for layer in config.sparse_layers(stack):
            for matrix in expert_matrices(config):
                yield ExpertKernel(stack, layer, matrix)


def split_matrices(matrices: Mapping[str, T]) -> tuple[tuple[T, ...], T]:
    """Return an expert's input matrices and its output matrix, from a mapping by name."""
    return tuple(matrices[name] for name in sorted(matrices) if name != "wo"), matrices["wo"]
