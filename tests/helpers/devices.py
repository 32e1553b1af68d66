"""Tests of several devices run in a session of their own, whose CPU is eight devices.

A test asks for it by `@pytest.mark.devices`. When the first such test of a file is due, all of the file that
are due run in a process of their own, and every one is reported with the outcome that it had there. Fixtures
are set up in that process only.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

FLAG = "--xla_force_host_platform_device_count=8"
_REPORTS = "QMOE_TESTS_REPORTS"
_SESSIONS = pytest.StashKey[dict[pathlib.Path, Mapping[str, Sequence[Any]]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Record the reports, in a session of eight devices."""
    if reports := os.environ.get(_REPORTS):
        config.pluginmanager.register(_Recorder(config, pathlib.Path(reports)))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Report a marked test as the session of its file does."""
    if item.get_closest_marker("devices") is None or _REPORTS in os.environ:
        return None
    sessions = item.config.stash.setdefault(_SESSIONS, {})
    if item.path not in sessions:
        sessions[item.path] = _run_session([other for other in item.session.items if other.path == item.path])
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in sessions[item.path][item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # of what tests before this one share with it
    return True


class _Recorder:
    """Appends the report of every phase of a test to a file."""

    def __init__(self, config: pytest.Config, path: pathlib.Path):
        self._config, self._path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._path.open("a") as file:
            file.write(json.dumps(data) + "\n")


def _run_session(items: Sequence[pytest.Item]) -> Mapping[str, Sequence[Any]]:
    """Run the marked ones of `items` and return their reports by node."""
    items = [item for item in items if item.get_closest_marker("devices") is not None]
    config = items[0].config
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "reports.jsonl")
        path.touch()
        flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
            + [item.nodeid for item in items],
            env=environment | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", _REPORTS: str(path)},
            cwd=config.rootpath, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = path.read_text().splitlines()
    found: dict[str, list[Any]] = collections.defaultdict(list)
    for line in lines:
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        found[report.nodeid].append(report)
    for item in items:
        if not found[item.nodeid]:
            told = f"the session of eight devices ended with {run.returncode}:\n{run.stdout}\n{run.stderr}"
            keywords = {name: 1 for name in item.keywords}
            found[item.nodeid].append(
                pytest.TestReport(item.nodeid, item.location, keywords, "failed", told, "call")
            )
    return found
