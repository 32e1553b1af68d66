"""Variants of one model side by side: what each costs on the disk, and what it loses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmoe_jax.artifact.sizes import Sizes, measure
from qmoe_jax.artifact.store import REPORT
from qmoe_jax.evaluation.loss import Evaluation

BFLOAT16_BITS = 16.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """The experts of one layer of an artifact.

    `tokens` are those in each expert's Hessian, `routed` all that the router sent it, `fallback` the experts with a
    matrix rounded to nearest for want of them; the other fields average over experts and matrices, by weights.
    """

    name: str
    routed: list[int]
    tokens: list[int]
    fallback: list[int]
    zeros: float
    bits: float
    output_error: float
    weight_error: float


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the comparison: the original (no `sizes`) or an artifact.

    Attributes:
      name: what the table calls it.
      evaluation: on the held-out examples.
      sizes: of the files on the disk, everything counted.
      layers: the compressed ones.
      seconds: the compression took; None where that is not known, or nothing was compressed.
      entropy: bits a digit that no code can pass which treats digits as independent: the mean over matrices of the
        entropy at their own share of zeros, both other digits equally likely. None but for ternary.
    """

    name: str
    evaluation: Evaluation
    sizes: Sizes | None = None
    layers: tuple[Layer, ...] = ()
    seconds: float | None = None
    entropy: float | None = None

    @property
    def bits_per_expert_parameter(self) -> float:
        """On the disk; 16 for the original."""
        return self.sizes.bits_per_expert_parameter if self.sizes else BFLOAT16_BITS

    @property
    def bits_per_parameter(self) -> float:
        """Of the whole model, on the disk; 16 for the original."""
        return self.sizes.bits_per_parameter if self.sizes else BFLOAT16_BITS

    @property
    def sparsity(self) -> float | None:
        """Share of zeros among the experts' weights."""
        return sum(layer.zeros for layer in self.layers) / len(self.layers) if self.layers else None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        evaluation = dataclasses.asdict(self.evaluation)
        evaluation["per_example"] = self.evaluation.per_example.tolist()
        return {
            "name": self.name,
            "evaluation": evaluation,
            "bits_per_expert_parameter": self.bits_per_expert_parameter,
            "bits_per_parameter": self.bits_per_parameter,
            "compression_ratio": BFLOAT16_BITS / self.bits_per_parameter,
            "expert_compression_ratio": BFLOAT16_BITS / self.bits_per_expert_parameter,
            "sparsity": self.sparsity,
            "entropy": self.entropy,
            "seconds": self.seconds,
            "sizes": dataclasses.asdict(self.sizes) if self.sizes else None,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }


def ternary_entropy(zeros: float) -> float:
    """Entropy in bits of a digit that is zero with this probability, else either of two equally likely ones."""
    terms = ((zeros, 1), ((1 - zeros) / 2, 2))
    return -sum(count * p * math.log2(p) for p, count in terms if p > 0)


def read_variant(name: str, path: str | Path, evaluation: Evaluation) -> Variant:
    """An artifact's row, from its files and the report its compression left.

    Raises:
      CheckpointError: it cannot be opened.
    """
    report = json.loads((Path(path) / REPORT).read_bytes())
    sizes = measure(path)
    ternary = sizes.codebook_bytes > 0
    shares = [z for g in report["groups"] for m in g["matrices"].values() for z in m["zeros"]]
    entropy = sum(map(ternary_entropy, shares)) / len(shares) if ternary and shares else None
    layers = tuple(_layers(report["groups"], sizes))
    return Variant(name, evaluation, sizes, layers, report["seconds"], entropy)


def _layers(groups: list[dict[str, Any]], sizes: Sizes) -> Iterator[Layer]:
    names = list(dict.fromkeys((group["stack"], group["layer"]) for group in groups))
    experts = sum(len(group["tokens"]) for group in groups)
    weights = sizes.expert_parameters / max(experts, 1)
    for stack, number in names:
        mine = [group for group in groups if (group["stack"], group["layer"]) == (stack, number)]
        matrices = [matrix for group in mine for matrix in group["matrices"].values()]
        mean = lambda field: sum(sum(m[field]) for m in matrices) / sum(len(m[field]) for m in matrices)  # noqa: B023
        routed = [count for group in mine for count in group["tokens"]]
        yield Layer(
            f"{stack} {number}",
            routed,
            [count for group in mine for count in group["calibrated"]],
            sorted(_fallbacks(mine)),
            zeros=mean("zeros"),
            bits=8 * sum(sum(m["bytes"]) for m in matrices) / (weights * len(routed)),
            output_error=mean("output_error"),
            weight_error=mean("weight_error"),
        )


def _fallbacks(groups: list[dict[str, Any]]) -> set[int]:
    return {
        group["start"] + expert
        for group in groups
        for matrix in group["matrices"].values()
        for expert, fell_back in enumerate(matrix["fallback"])
        if fell_back
    }
