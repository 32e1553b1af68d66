"""BLAS on one thread, so that the same inputs give the same digits on any number of cores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import scipy.linalg  # noqa: F401 (loads the LAPACK that jax calls on a CPU: only what is loaded can be limited)
from threadpoolctl import threadpool_limits


@contextlib.contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """Limit every BLAS of this process to one thread, and restore its threads at the end.

    OpenBLAS splits a Cholesky factorization by the number of its threads, and each split rounds differently.
    XLA's own products do not depend on the number of threads; they keep all of them.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        yield
