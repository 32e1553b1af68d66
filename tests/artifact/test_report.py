"""The report of a compression: what is written is read back, but for NaN and infinity."""

import json
import math
import pathlib

import pytest

from qmoe_jax.artifact.report import GroupReport, MatrixReport, RunReport
from qmoe_jax.files.errors import CheckpointError


def matrix(error: float = 0.5, fallback: tuple[bool, ...] = (False, False)) -> MatrixReport:
    return MatrixReport((0.25, error), (0.125, error), (0.9, 0.8), (10, 12), fallback)


def group(start: int, tokens: tuple[int, int], **matrices: MatrixReport) -> GroupReport:
    return GroupReport("encoder", 1, start, tokens, tokens, matrices or {"wi": matrix()}, 1.5)


def write(root: pathlib.Path, report: RunReport) -> RunReport:
    (root / "report.json").write_bytes(report.render())
    return RunReport.read(root)


def test_a_report_survives_writing_and_reading(tmp_path: pathlib.Path) -> None:
    report = RunReport((group(0, (7, 8)), group(2, (9, 0), wi=matrix(), wo=matrix())), 12.5, "cpu")
    assert write(tmp_path, report) == report


@pytest.mark.parametrize("error", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_becomes_null_and_then_nan(tmp_path: pathlib.Path, error: float) -> None:
    found = write(tmp_path, RunReport((group(0, (7, 8), wi=matrix(error)),)))
    stored = json.loads((tmp_path / "report.json").read_bytes())["groups"][0]["matrices"]["wi"]
    assert stored["output_error"] == [0.125, None]
    first, second = found.groups[0].matrices["wi"].output_error
    assert (first, math.isnan(second)) == (0.125, True)


def test_an_artifact_without_a_report_has_an_empty_one(tmp_path: pathlib.Path) -> None:
    assert RunReport.read(tmp_path) == RunReport()


def test_a_flipped_figure_is_found(tmp_path: pathlib.Path) -> None:
    (tmp_path / "report.json").write_bytes(RunReport((group(0, (7, 8)),)).render().replace(b"0.25", b"0.35"))
    with pytest.raises(CheckpointError, match="damaged"):
        RunReport.read(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"groups": [{}], "seconds": 1, "device": "cpu"}'])
def test_a_damaged_report_is_refused_by_path(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"report\.json") as caught:
        RunReport.read(tmp_path)
    assert "remove it" in str(caught.value)


def test_experts_rounded_to_nearest_are_listed_with_their_tokens() -> None:
    report = RunReport((group(2, (0, 9), wi=matrix(), wo=matrix(fallback=(True, False))),))
    (found,) = report.fallbacks
    assert (found.expert, found.matrix, found.calibration_tokens) == (2, "wo", 0)


def test_under_calibrated_experts_are_compared_with_the_mean_of_their_layer() -> None:
    report = RunReport((group(0, (100, 5)), group(2, (0, 95))))
    assert report.under_calibrated() == {"encoder 1": {2: 0}}
    assert report.under_calibrated(0.11) == {"encoder 1": {1: 5, 2: 0}}
    assert report.under_calibrated(0.0) == {}
