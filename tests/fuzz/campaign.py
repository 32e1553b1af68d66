"""The fuzz run of one target: worker processes one after another, each begun anew after a crash or hang."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 30.0
"""Seconds without a new input until a worker that does not react to its own alarm is killed."""
WORKER = ["-m", "tests.fuzz.worker"]
"""Arguments of Python for a worker."""
START = 180.0
"""Seconds for imports, the sample and compilation."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """An input that neither loads nor is refused by name."""

    told: str
    place: str
    data: bytes


@dataclasses.dataclass
class Result:
    """The fuzz run of a target: inputs tried, different outcomes seen, faults by place."""

    tried: int = 0
    places: int = 0
    faults: dict[str, Fault] = dataclasses.field(default_factory=dict)


def fuzz(target: str, seconds: float, seed: int) -> Result:
    """Fuzz a target for some seconds (and the start of its process), whatever becomes of the process."""
    result, left, start = Result(), seconds, seed
    while left > 0:
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            began = time.monotonic()
            ended = _run(target, folder, left, start)
            if ready := (folder / "ready").exists():
                began = (folder / "ready").stat().st_mtime - time.time() + time.monotonic()
            _collect(folder, result)
            if ended is not None:
                data = (folder / "current").read_bytes() if (folder / "current").exists() else b""
                place = ended.splitlines()[0]
                result.faults.setdefault(place, Fault(ended, place, data))
            if (folder / "done").exists() or not ready:
                break
        left -= time.monotonic() - began
        start += 1_000_003
    return result


def _run(target: str, folder: Path, seconds: float, seed: int) -> str | None:
    """Run a worker to its end; return what ended it, None where it came to its own end."""
    command = [sys.executable, *WORKER, target, str(folder), str(seconds), str(seed)]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )
        started = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.05)
                current = folder / "current"
                idle = time.time() - current.stat().st_mtime if current.exists() else 0.0
                if idle > PATIENCE or (not current.exists() and time.monotonic() - started > START):
                    process.kill()
                    process.wait()
                    return "hangs without reacting to signals"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == 0:
        return None
    tail = log.read_text(errors="replace")[-600:]
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}\n{tail}"
    return f"the worker failed with exit code {process.returncode}\n{tail}"


def _collect(folder: Path, result: Result) -> None:
    if (folder / "events").exists():
        for line in (folder / "events").read_text().splitlines():
            event = json.loads(line)
            result.tried += event.get("tried", 0)
            result.places = max(result.places, event.get("places", 0))
            if "fault" in event:
                fault = Fault(event["fault"], event["place"], bytes.fromhex(event["data"]))
                result.faults.setdefault(fault.place, fault)
