"""Variants of one model side by side: size on disk and loss."""

from __future__ import annotations

import dataclasses
from typing import Any

from qmoe_jax.artifact.report import CompressionReport
from qmoe_jax.artifact.sizes import BFLOAT16_BITS
from qmoe_jax.evaluation.loss import Evaluation


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a comparison: an artifact, or the original.

    Attributes:
        name: name in tables and plots.
        evaluation: result on the held-out examples.
        report: of the compression; None for the original.
    """

    name: str
    evaluation: Evaluation
    report: CompressionReport | None = None

    @property
    def bits_per_expert_parameter(self) -> float:
        """Bits on disk, everything counted; 16 for the original."""
        return self.report.sizes.bits_per_expert_parameter if self.report else BFLOAT16_BITS

    @property
    def bits_per_parameter(self) -> float:
        """Bits on disk of the whole model; 16 for the original."""
        return self.report.sizes.bits_per_parameter if self.report else BFLOAT16_BITS

    @property
    def expert_compression_ratio(self) -> float:
        """Size of the experts in bfloat16 as a multiple of their size on disk."""
        return BFLOAT16_BITS / self.bits_per_expert_parameter

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        evaluation = {**vars(self.evaluation), "per_example": self.evaluation.per_example.tolist()}
        report = self.report
        return {
            "name": self.name,
            "evaluation": evaluation,
            "bits_per_expert_parameter": self.bits_per_expert_parameter,
            "bits_per_parameter": self.bits_per_parameter,
            "compression_ratio": BFLOAT16_BITS / self.bits_per_parameter,
            "expert_compression_ratio": self.expert_compression_ratio,
            "sparsity": report and report.sparsity,
            "entropy": report and report.entropy,
            "seconds": report and report.seconds,
            "sizes": report and dataclasses.asdict(report.sizes),
            "layers": [dataclasses.asdict(layer) for layer in report.layers] if report else [],
        }
