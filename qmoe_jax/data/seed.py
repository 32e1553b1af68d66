"""The range of seeds, one for all generators."""

from __future__ import annotations

import operator
from typing import Any

SEEDS = 2**32
"""Seeds are below this: NumPy's legacy generator, which draws the masks, takes no larger one."""


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return a seed as an int.

    Raises:
        ValueError: it is not an integer, or not in the range of every generator.
    """
    try:
        number = None if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = None
    if number is None or not 0 <= number < SEEDS:
        raise ValueError(f"{name}: expected an integer of 0 to {SEEDS - 1}, found {seed!r}")
    return number
