"""numba's options, and the form of the arrays that compiled functions read.

numba caches what it compiles on disk, beside each module or in NUMBA_CACHE_DIR. It compiles a function anew
where the function's own file changed, not where a file changed that it calls into: after editing such a file,
delete the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# No assumption about NaN or infinity: they must come out where they went in.
OPTIONS: Any = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}}

as_index: Any = np.uintp
"""The type of indices in compiled code: numba checks signed ones for counting from the end."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, for compiled code or Python to call; it runs without the GIL."""
    return numba.njit(**OPTIONS)(inspect.unwrap(function))  # a type checker may have wrapped it


def read_only(array: Any) -> np.ndarray:
    """Return a contiguous read-only view, or copy where the array is not contiguous.

    To numba, XLA's buffers and NumPy's arrays are then of one type: one compiled version serves every caller.
    """
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
