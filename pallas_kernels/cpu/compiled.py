"""numba's options, and the form of the arrays that compiled functions read.

What numba compiles is cached on disk, where `cache` finds a folder. A function is compiled anew where its own
file changed, not where a file changed that it calls into: after editing such a file, delete the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from pallas_kernels.cpu.cache import enable_cache

# No assumption about NaN or infinity: they must come out where they went in.
OPTIONS: Any = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}}

as_index: Any = np.uintp
"""The type of indices in compiled code: numba checks signed ones for counting from the end."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, for compiled code or Python to call; it runs without the GIL."""
    dispatcher = numba.njit(**OPTIONS)(inspect.unwrap(function))  # a type checker may have wrapped it
    enable_cache(dispatcher)
    return dispatcher


def read_only(array: Any) -> np.ndarray:
    """Return a contiguous read-only view, or copy where the array is not contiguous.

    To numba, XLA's buffers and NumPy's arrays are then of one type: one compiled version serves every caller.
    """
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
