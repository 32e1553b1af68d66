"""What benchmarks share: contenders timed in turn, the machine named, results as JSON."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def best_seconds(contenders: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, float]:
    """The shortest time of each, which other work on the machine disturbs least; `contender(round)` is one run.

    They take turns, so that a slower minute of the machine meets all of them; the first round warms up.
    """
    best = dict.fromkeys(contenders, float("inf"))
    for i in range(rounds + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender(i)
            if i:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def machine(threads: int) -> dict[str, Any]:
    """Processor, threads in use, versions, and how busy the machine was with other work."""
    import jax
    import numba

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (jax, numba, np)},
    }


def use_threads(count: int) -> None:
    """Holds this process to `count` cores. Call it before jax starts: everything then makes as many threads."""
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise SystemExit(f"--threads {count}: this machine has {len(cores)} cores")
    os.sched_setaffinity(0, cores[:count])
    for variable in ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[variable] = str(count)


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Writes the result where the user asked for it."""
    if path:
        pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")
