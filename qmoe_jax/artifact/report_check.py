"""Checks of the figures in a report: of the right types, and one for each expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmoe_jax.artifact.report import GroupReport, MatrixReport


def is_count(value: Any) -> bool:
    """Return whether a value is an integer of at least zero."""
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Return whether a value is a number; NaN is one."""
    return type(value) in (int, float)


def is_flag(value: Any) -> bool:
    """Return whether a value is true or false."""
    return type(value) is bool


_MATRIX: Mapping[str, Callable[[Any], bool]] = {
    "weight_error": is_number,
    "output_error": is_number,
    "sparsity": lambda value: is_number(value) and 0 <= value <= 1,
    "bytes": is_count,
    "fallback": is_flag,
}


def check_group(group: GroupReport) -> None:
    """Raise `ValueError` naming the first field that is of another type, or not one per expert."""
    _require(group.stack in ("encoder", "decoder"), "stack", group.stack)
    _require(is_count(group.layer) and is_count(group.start), "layer, start", (group.layer, group.start))
    _require(is_number(group.seconds), "seconds", group.seconds)
    experts = len(group.routed_tokens)
    for name in ("routed_tokens", "calibration_tokens"):
        _check_each(name, getattr(group, name), is_count, experts)
    for matrix, report in group.matrices.items():
        _check_matrix(matrix, report, experts)


def _check_matrix(matrix: str, report: MatrixReport, experts: int) -> None:
    for name, fits in _MATRIX.items():
        _check_each(f"{matrix}: {name}", getattr(report, name), fits, experts)


def _check_each(name: str, values: tuple[Any, ...], fits: Callable[[Any], bool], experts: int) -> None:
    _require(len(values) == experts and all(map(fits, values)), name, values)


def _require(fits: bool, name: str, found: Any) -> None:
    if not fits:
        raise ValueError(f"{name}: found {found!r}")


def check_pipeline(pipeline: Any) -> None:
    """Check the times of stages, by stage and name. Raises `ValueError`."""
    stages = pipeline.values() if isinstance(pipeline, Mapping) else [None]
    if not all(isinstance(stage, Mapping) and all(map(is_number, stage.values())) for stage in stages):
        raise ValueError(f"pipeline {pipeline!r}")
