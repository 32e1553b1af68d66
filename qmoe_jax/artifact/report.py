"""The report of a compression: figures of every expert matrix, written during the run and read afterwards.

`report.json` holds what differs from run to run. JSON has no NaN and no infinity: both are written as null
and read as NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from qmoe_jax.artifact.manifest import REPORT, digest
from qmoe_jax.artifact.report_check import check_group, check_pipeline, is_number
from qmoe_jax.artifact.sizes import Sizes, measure
from qmoe_jax.coding import entropy_bits
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.reading import parse_json
from qmoe_jax.files.store import Place, open_store

UNDER_CALIBRATED = 0.1
"""Experts with less than this share of the mean number of calibration tokens are called under-calibrated."""


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """One matrix of an expert group; every field has one entry per expert.

    Attributes:
        weight_error: ‖Q - W‖² / ‖W‖².
        output_error: tr(D H Dᵀ) / tr(W H Wᵀ) with D = Q - W and the damped Hessian H; the identity in its
            place where there is none.
        sparsity: share of zeros.
        bytes: size of all stored parts.
        fallback: rounded to nearest although GPTQ was asked for: no calibration tokens, or a Hessian that has
            no Cholesky factor.
    """

    weight_error: tuple[float, ...]
    output_error: tuple[float, ...]
    sparsity: tuple[float, ...]
    bytes: tuple[int, ...]
    fallback: tuple[bool, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return to_json(vars(self))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> MatrixReport:
        """Return the report that `to_json` wrote."""
        values: dict[str, Any] = {
            name: tuple(math.nan if value is None else value for value in values)
            for name, values in fields.items()
        }
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class GroupReport:
    """One expert group of a layer.

    Attributes:
        stack: "encoder" or "decoder".
        layer: number of the layer within its stack.
        start: number of the first expert.
        routed_tokens: tokens that the router sent to each expert.
        calibration_tokens: those of them that are in the expert's Hessian.
        matrices: the expert's matrices by name.
        seconds: time to quantize and write the group.
        producer: the software and the machine that quantized the group, by the names of what decides digits.
    """

    stack: str
    layer: int
    start: int
    routed_tokens: tuple[int, ...]
    calibration_tokens: tuple[int, ...]
    matrices: Mapping[str, MatrixReport]
    seconds: float
    producer: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def layer_name(self) -> str:
        """Name of the layer in texts and tables, such as "encoder 3"."""
        return f"{self.stack} {self.layer}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**vars(self), "matrices": {name: matrix.to_json() for name, matrix in self.matrices.items()}}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> GroupReport:
        """Return the report that `to_json` wrote. Raises `TypeError`, `KeyError`, `ValueError`."""
        tokens = {name: tuple(fields[name]) for name in ("routed_tokens", "calibration_tokens")}
        matrices = {name: MatrixReport.from_json(matrix) for name, matrix in fields["matrices"].items()}
        group = cls(**{**fields, **tokens, "matrices": matrices})
        check_group(group)
        return group


@dataclasses.dataclass(frozen=True)
class Fallback:
    """An expert's matrix that was rounded to nearest although GPTQ was asked for."""

    stack: str
    layer: int
    expert: int
    matrix: str
    calibration_tokens: int

    @property
    def reason(self) -> str:
        """Reason for the missing factor of its Hessian."""
        return fallback_reason(self.calibration_tokens)


def fallback_reason(calibration_tokens: int) -> str:
    """Return why an expert with so many calibration tokens was rounded to nearest."""
    if calibration_tokens == 0:
        return "no calibration tokens"
    return "a Hessian that is zero or has no Cholesky factor (more damping may help)"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The experts of one layer.

    Attributes:
        name: such as "encoder 3".
        routed_tokens: tokens that the router sent to each expert.
        calibration_tokens: those of them that are in the expert's Hessian.
        fallback: experts with a matrix that was rounded to nearest (`fallback_reason`).
        sparsity: share of zeros, mean over experts and matrices, as are the errors.
        bits_per_parameter: of the stored matrices, without headers, padding and codebooks.
        output_error: see `MatrixReport`.
        weight_error: see `MatrixReport`.
    """

    name: str
    routed_tokens: tuple[int, ...]
    calibration_tokens: tuple[int, ...]
    fallback: tuple[int, ...]
    sparsity: float
    bits_per_parameter: float
    output_error: float
    weight_error: float


@dataclasses.dataclass(frozen=True)
class RunReport:
    """The content of `report.json`.

    Attributes:
        groups: the expert groups, sorted. Those that an earlier, interrupted run finished keep that run's
            figures.
        seconds: duration of the run that finished the artifact; None before.
        device: name of the device that the run computed on.
        pipeline: of the stages that worked at once in that run, on the host that finished the artifact:
            seconds at work ("busy") and seconds that it waited for another stage ("waited"); and of staging
            the bytes that were "needed" and those that were "read" in chunks.
    """

    groups: tuple[GroupReport, ...] = ()
    seconds: float | None = None
    device: str | None = None
    pipeline: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def render(self) -> bytes:
        """Return the bytes of the file."""
        producers = list(self.producers)
        groups = [{**group.to_json(), "producer": producers.index(group.producer)} for group in self.groups]
        content = {**vars(self), "groups": groups, "producers": producers}
        whole = {"checksum": digest(content), **content}
        return json.dumps(whole, sort_keys=True, allow_nan=False).encode() + b"\n"

    @property
    def producers(self) -> tuple[Mapping[str, str], ...]:
        """The software and machines that quantized the groups, each once; usually there is one."""
        return tuple(map(dict, dict.fromkeys(tuple(sorted(group.producer.items())) for group in self.groups)))

    @classmethod
    def read(cls, root: Place) -> Self:
        """Read the report of an artifact, finished or not; an empty one without a file.

        Raises:
            CheckpointError: the file is damaged, or was written by another version.
        """
        store = open_store(root)
        path = store.path(REPORT)
        if not store.exists(REPORT):
            return cls()
        try:
            content = parse_json(store.read(REPORT))
            if content.pop("checksum") != digest(content):
                raise ValueError("another checksum than its own")
            seconds, device = content["seconds"], content["device"]
            if not (seconds is None or is_number(seconds)) or not (device is None or isinstance(device, str)):
                raise ValueError(f"seconds {seconds!r}, device {device!r}")
            check_pipeline(pipeline := content.get("pipeline", {}))
            producers = content["producers"]
            groups = tuple(
                GroupReport.from_json({**group, "producer": producers[group["producer"]]})
                for group in content["groups"]
            )
            return cls(groups, seconds, device, pipeline)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "is damaged, or was written by another version",
                path=path,
                found=repr(error),
                remedy="remove it: the figures of finished groups are lost, the groups are not",
            ) from error

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Every matrix that was rounded to nearest, whose `reason` says why."""
        return tuple(
            Fallback(group.stack, group.layer, group.start + e, name, group.calibration_tokens[e])
            for group in self.groups
            for name, matrix in group.matrices.items()
            for e, fell_back in enumerate(matrix.fallback)
            if fell_back
        )

    def under_calibrated(self, threshold: float = UNDER_CALIBRATED) -> dict[str, dict[int, int]]:
        """Return, by layer, the experts with few calibration tokens: their numbers and their token counts.

        Args:
            threshold: share of the layer's mean number of calibration tokens below which an expert is named.
        """
        layers: dict[str, dict[int, int]] = {}
        for group in self.groups:
            counts = dict(enumerate(group.calibration_tokens, group.start))
            layers.setdefault(group.layer_name, {}).update(counts)
        starved = {
            name: {
                e: count
                for e, count in counts.items()
                if count < threshold * sum(counts.values()) / len(counts)
            }
            for name, counts in layers.items()
        }
        return {name: experts for name, experts in starved.items() if experts}

    @property
    def sparsity(self) -> float:
        """Share of zeros among all quantized weights."""
        return _mean(_of_matrices(self.groups, "sparsity"))


@dataclasses.dataclass(frozen=True)
class CompressionReport(RunReport):
    """The result of `compress`: what the run reported, and what the artifact's files measure.

    Attributes:
        path: the artifact.
        sizes: bytes of its files, and the parameters that they hold.
    """

    path: Path | str = dataclasses.field(kw_only=True)
    sizes: Sizes = dataclasses.field(kw_only=True)

    @classmethod
    def read(cls, root: Place) -> Self:
        """Read the report of a finished artifact and measure its files.

        Raises:
            CheckpointError: the artifact is unfinished or damaged.
        """
        store = open_store(root)
        return cls(**vars(RunReport.read(store)), path=store.root, sizes=measure(store))

    @property
    def entropy(self) -> float | None:
        """Bits per digit of a code that treats digits as independent; None for kinds without a codebook.

        The mean over matrices of the entropy at their own sparsity, both other digits equally likely.
        """
        shares = _of_matrices(self.groups, "sparsity")
        if not self.sizes.codebook_bytes or not shares:
            return None
        return _mean([entropy_bits(np.array([zero, (1 - zero) / 2, (1 - zero) / 2])) for zero in shares])

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """The compressed layers, in the order in which they were compressed."""
        by_name: dict[str, list[GroupReport]] = {}
        for group in self.groups:
            by_name.setdefault(group.layer_name, []).append(group)
        experts = sum(len(group.routed_tokens) for group in self.groups)
        parameters = self.sizes.expert_parameters / max(experts, 1)
        return tuple(_layer(name, groups, parameters) for name, groups in by_name.items())


def _layer(name: str, groups: list[GroupReport], parameters: float) -> LayerReport:
    """Return the report of a layer from those of its groups; `parameters` is the number per expert."""
    fallback = {
        group.start + e
        for group in groups
        for matrix in group.matrices.values()
        for e, fell_back in enumerate(matrix.fallback)
        if fell_back
    }
    routed = tuple(count for group in groups for count in group.routed_tokens)
    return LayerReport(
        name,
        routed,
        tuple(count for group in groups for count in group.calibration_tokens),
        tuple(sorted(fallback)),
        sparsity=_mean(_of_matrices(groups, "sparsity")),
        bits_per_parameter=8 * sum(_of_matrices(groups, "bytes")) / (parameters * len(routed)),
        output_error=_mean(_of_matrices(groups, "output_error")),
        weight_error=_mean(_of_matrices(groups, "weight_error")),
    )


def _of_matrices(groups: Iterable[GroupReport], field: str) -> list[Any]:
    """Return a field of all matrices of all experts."""
    matrices = (matrix for group in groups for matrix in group.matrices.values())
    return [value for matrix in matrices for value in getattr(matrix, field)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def to_json(value: Any) -> Any:
    """Return plain values with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: to_json(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
