"""What a compression reports: every expert's tokens, errors, zeros and bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qmoe_jax.artifact.sizes import Sizes
from qmoe_jax.compression.experts import MatrixRecord


@dataclasses.dataclass(frozen=True)
class GroupRecord:
    """One expert group of a layer: `tokens` routed to each expert, `calibrated` those in its Hessian, its matrices."""

    stack: str
    layer: int
    start: int
    tokens: list[int]
    calibrated: list[int]
    matrices: dict[str, MatrixRecord]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> GroupRecord:
        """The record that `to_json` wrote."""
        matrices = {name: MatrixRecord(**matrix) for name, matrix in fields["matrices"].items()}
        return cls(**{**fields, "matrices": matrices})


@dataclasses.dataclass(frozen=True)
class Fallback:
    """An expert matrix that was rounded to nearest although GPTQ was asked for."""

    stack: str
    layer: int
    expert: int
    matrix: str
    calibrated_tokens: int


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """The result of `compress`: where the artifact lies, its sizes, a record of each group, the seconds it took.

    Groups written by an earlier run that was stopped keep the records of that run.
    """

    path: Path
    sizes: Sizes
    groups: tuple[GroupRecord, ...]
    seconds: float

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Every matrix rounded to nearest for want of calibration tokens or of a factor of its Hessian."""
        return tuple(
            Fallback(group.stack, group.layer, group.start + e, name, group.calibrated[e])
            for group in self.groups
            for name, matrix in group.matrices.items()
            for e, fell_back in enumerate(matrix.fallback)
            if fell_back
        )

    @property
    def sparsity(self) -> float:
        """Share of zeros among all quantized weights."""
        shares = [zeros for g in self.groups for matrix in g.matrices.values() for zeros in matrix.zeros]
        return sum(shares) / len(shares) if shares else 0.0
