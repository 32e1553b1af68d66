"""Runs a program as a child process and measures its memory and its time from outside."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

INTERVAL = 0.05
"""Seconds between two looks at the child. The kernel keeps a process's own peak: nothing of it is missed."""

_KILOBYTE = 1024


@dataclasses.dataclass(frozen=True)
class Usage:
    """The time, memory and disk transfers of a child process.

    Attributes:
        seconds: from start to end.
        cpu_seconds: of its threads and its finished children together.
        peak_bytes: its largest resident set (VmHWM), pages of mapped files included.
        peak_anonymous_bytes: the largest part of it, of those seen, that no file backs (RssAnon).
        peak_tree_bytes: the largest sum, of those seen, of the resident sets of it and all its descendants.
        read_bytes: read from the disk, not from the page cache.
        written_bytes: written to the disk.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int
    peak_tree_bytes: int
    read_bytes: int
    written_bytes: int


def run(command: Sequence[str], environment: Mapping[str, str]) -> Usage:
    """Run a command to its end.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    began = time.monotonic()
    child = subprocess.Popen(list(command), env=dict(environment))
    peak = anonymous = tree = 0
    transferred: dict[str, int] = {}
    try:
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            status = _fields(child.pid, "status")
            peak = max(peak, status.get("VmHWM", 0) * _KILOBYTE)
            anonymous = max(anonymous, status.get("RssAnon", 0) * _KILOBYTE)
            resident = (_fields(pid, "status").get("VmRSS", 0) for pid in _family(child.pid))
            tree = max(tree, sum(resident) * _KILOBYTE)
            transferred = _fields(child.pid, "io") or transferred
            time.sleep(INTERVAL)
        seconds = time.monotonic() - began
        _, status_code, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status_code)
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, list(command))
    return Usage(
        seconds,
        usage.ru_utime + usage.ru_stime,
        peak,
        anonymous,
        tree,
        transferred.get("read_bytes", 0),
        transferred.get("write_bytes", 0),
    )


def _fields(pid: int, name: str) -> dict[str, int]:
    """Return the numbers in a file of /proc/<pid>; none of a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return {}
    return {match[1]: int(match[2]) for match in re.finditer(r"^(\w+):\s+(\d+)", text, re.MULTILINE)}


def _family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(child))]
