"""Timing of contenders, a description of the machine, and JSON output, shared by the CPU benchmarks."""

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
    """Return the shortest time of each contender, the figure that other work on the machine disturbs least.

    Contenders take turns, so that a slower minute of the machine affects all of them; the first round warms
    up.

    Args:
        contenders: name -> a function that takes the number of the round and runs once.
        rounds: timed rounds.
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
    """Return the processor, the threads in use, versions, and the load average before the run."""
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
    """Restrict this process and its thread pools to `count` cores; to be called before jax starts."""
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise SystemExit(f"--threads {count}: this machine has {len(cores)} cores")
    os.sched_setaffinity(0, cores[:count])
    for variable in ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[variable] = str(count)


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Write the result to `path`; do nothing if it is None."""
    if path:
        pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")
