"""Work shared between threads in small pieces: whoever is free takes the next one.

Pieces that are taken, not given, suit a machine with other work to do: a thread that is late or slow takes fewer of
them. The helpers are Python threads that leave the interpreter's lock while they compute, and sleep otherwise:
a scheduler whose threads wait in a loop (OpenMP's do, for milliseconds) would take the cores from XLA's own,
which run before and after.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from pallas_kernels.cpu.compiled import MOST_THREADS, threads
from pallas_kernels.cpu.simd import intrinsic


def share(kernel: Callable[..., None], *args: Any) -> None:
    """Runs `kernel(taken, *args)` in as many threads as kernels use, this one among them, until all have returned.

    The kernel takes pieces by `take(taken)` until there are none. Any number of threads may call this at once.
    """
    taken = np.zeros(1, np.int64)
    helpers = [_pool().submit(kernel, taken, *args) for _ in range(threads() - 1)]
    kernel(taken, *args)
    for helper in helpers:
        if not helper.cancel():  # one that has not begun has nothing left to do
            helper.result()


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(max(1, MOST_THREADS - 1), "pallas_kernels")


@intrinsic
def take(typing, taken):
    """`take(taken)`: the number of the next piece, in compiled code."""

    def generate(context, builder, signature, args):
        counter = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(taken), generate
