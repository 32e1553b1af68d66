"""Functions compiled by numba: cached on disk, and one parallel region at a time.

Import this only where numba is there: `pallas_kernels.backend` says whether it is.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numba

# No assumption about NaN or infinity: they must come out where they went in.
OPTIONS: Any = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}}

MOST_THREADS: int = vars(numba.config)["NUMBA_NUM_THREADS"]
_one_region = (
    threading.Lock()
)  # numba's fallback scheduler aborts the process when two threads enter it at once
_threads = [MOST_THREADS]


def compiled(function: Callable[..., Any]) -> Any:
    """A function for compiled code to call."""
    return numba.njit(**OPTIONS)(inspect.unwrap(function))  # a type checker may have wrapped it


def parallel(function: Callable[..., Any]) -> Any:
    """A function for Python to call, its `prange` loops spread over threads; the GIL is free meanwhile."""
    kernel = numba.njit(parallel=True, **OPTIONS)(inspect.unwrap(function))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with _one_region:
            numba.set_num_threads(threads())
            return kernel(*args)

    return call


def threads() -> int:
    """How many threads kernels use."""
    return _threads[0]


def set_threads(count: int) -> None:
    """Sets how many threads kernels use from here on, in every thread of the process.

    Raises:
      ValueError: numba was started with fewer (NUMBA_NUM_THREADS, the machine's cores by default).
    """
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(f"threads: expected 1 to {MOST_THREADS}, found {count}")
    _threads[0] = count
