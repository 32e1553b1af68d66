"""Loops shared between threads in small chunks: each thread takes the next chunk when it has finished one.

Chunks that are taken, not assigned, suit a machine with other work to do: a thread that is late or slow takes
fewer of them. The helpers are Python threads that release the interpreter's lock while they compute, and
sleep otherwise: a scheduler whose threads wait in a loop (OpenMP's do, for milliseconds) would take the cores
from XLA's own threads, which run before and after.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types

from pallas_kernels.cpu.simd import intrinsic

_NO_CHUNK = 2**62
"""A counter beyond any loop's chunks: its threads stop."""

NUM_THREADS: int = vars(numba.config)["NUMBA_NUM_THREADS"]
"""Threads per loop: the environment's NUMBA_NUM_THREADS, by default the cores of the machine."""


def num_threads() -> int:
    """Return how many threads a loop uses, for choosing the size of its chunks."""
    return NUM_THREADS


def parallel_for(body: Callable[..., None], *args: Any) -> None:
    """Run `body(counter, *args)` in `num_threads()` threads, this one among them, until all have returned.

    Any number of threads may call this at once: each call has its own counter, all share one pool of helpers.

    Args:
        body: a compiled function that works on the chunks numbered `next_chunk(counter)` until there are none
            left.
        args: the operands, the same for each thread.

    Raises:
        Exception: whatever `body` raised in one of the threads, or a signal's handler in this one (Ctrl-C).
            By then no thread works on `args` any more, so that the caller may free them.
    """
    counter = np.zeros(1, np.int64)
    helpers = [_pool().submit(body, counter, *args) for _ in range(num_threads() - 1)]
    try:
        body(counter, *args)
    except BaseException:
        counter[0] = _NO_CHUNK
        _wait(helpers, counter)
        raise
    _wait(helpers, counter)
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _wait(helpers: list[concurrent.futures.Future[None]], counter: np.ndarray) -> None:
    """Wait until no helper runs, whatever interrupts this thread, and then raise the interruption."""
    interruption: BaseException | None = None
    for helper in helpers:
        # One that has not begun would find no chunk left.
        while not (helper.done() or helper.cancel()):
            try:
                concurrent.futures.wait([helper])
            except BaseException as error:  # raised below
                counter[0], interruption = _NO_CHUNK, error
    if interruption is not None:
        raise interruption


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(max(1, NUM_THREADS - 1), "pallas_kernels")


@intrinsic
def next_chunk(typing, counter):
    """`next_chunk(counter)`: the number of the next chunk (int64), taken atomically; for compiled code."""

    def generate(context, builder, signature, args):
        address = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", address, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate
