"""The log of a run: appended, a line per layer and minute, warnings and the error in it."""

import pathlib
import re
import warnings

import pytest

from qmoe_jax.cli.run_log import RunLog, log_path
from qmoe_jax.files.errors import CheckpointError
from tests.helpers.clock import Clock

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")


def lines(file: pathlib.Path) -> list[str]:
    """The lines of a log without the time."""
    found = file.read_text().splitlines()
    assert all(STAMP.match(line) or line.startswith("    ") for line in found)
    return [STAMP.sub("", line) for line in found]


def test_a_log_tells_beginning_layers_minutes_and_end(tmp_path):
    clock, heard = Clock(), []
    with RunLog(tmp_path / "a.log", {"options": "x"}, lambda *call: heard.append(call), clock=clock) as log:
        for second in range(0, 200, 10):
            clock.now = float(second)
            log(second, 200, f"encoder layer {second // 100}, experts")
    told = lines(tmp_path / "a.log")
    assert told[0].startswith("begin: ") and "options: x" in told and told[-1] == "end"
    assert [line.split(",")[0] for line in told if line.startswith("encoder")] == [
        "encoder layer 0", "encoder layer 0", "encoder layer 1", "encoder layer 1"
    ]  # fmt: skip
    assert heard[-1] == (190, 200, "encoder layer 1, experts") and len(heard) == 20


def test_a_restart_appends(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path / "a.log", {}) as log:
            log(1, 1, "finished before")
    assert [line for line in lines(tmp_path / "a.log") if line.startswith(("begin", "end"))] == [
        lines(tmp_path / "a.log")[0], "end"
    ] * 2  # fmt: skip


def test_warnings_and_errors_are_logged_and_passed_on(tmp_path):
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="two"),
        RunLog(tmp_path / "a.log", {}) as log,
    ):
        log(0, 2, "encoder layer 0")
        warnings.warn("a file is damaged", UserWarning, stacklevel=1)
        raise ValueError("line one\nline two")
    assert lines(tmp_path / "a.log")[-3:] == [
        "warning: a file is damaged", "error: ValueError: line one", "    line two"
    ]  # fmt: skip


def test_a_run_that_is_refused_says_why(tmp_path):
    with pytest.raises(ValueError), RunLog(tmp_path / "a.log", {}):
        raise ValueError("too small")
    assert lines(tmp_path / "a.log")[-1] == "error: ValueError: too small"


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "a.log").mkdir()
    with pytest.raises(CheckpointError, match="is a directory"):
        RunLog(tmp_path / "a.log", {})


@pytest.mark.parametrize(
    ("output", "scratch", "expected"),
    [
        ("/runs/a", None, "/runs/a.log"),
        ("/runs/a/", "/fast", "/runs/a.log"),
        ("file:///runs/a", None, "/runs/a.log"),
        ("gs://bucket/a", "/fast/b", "/fast/b.log"),
    ],
)
def test_a_log_lies_beside_the_artifact_or_the_scratch_folder(output, scratch, expected):
    assert log_path(output, scratch) == pathlib.Path(expected)
