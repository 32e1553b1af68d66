"""The settings of jax under which this package computes, whatever its caller has set.

A caller may have enabled 64 bits, made promotions raise or turned on a debug flag. Functions that read,
compress, load and run models set these back for themselves (`own_settings`), so that an artifact has the same
bytes and a model the same logits in every process. Where a debug flag would have looked for NaN, the checks
of `files/finite.py` do, and name the place.

Modules, kernels and quantization run inside the caller's own programs too, under the caller's settings: they
state their dtypes and ranks. Left to the caller everywhere are the device (`jax_default_device`), the
compilation cache and, outside of compression, the precision of products (`jax_default_matmul_precision`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def own_settings(*, matmul_precision: bool = False) -> Iterator[None]:
    """Compute under the default settings in this context, or in a function that it decorates.

    Args:
        matmul_precision: also take the default precision of products, where bytes depend on it.
    """
    with contextlib.ExitStack() as stack:
        for setting in (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.default_prng_impl("threefry2x32"),
            jax.threefry_partitionable(True),
            jax.transfer_guard("allow"),
            jax.disable_jit(False),
            jax.debug_nans(False),
            jax.debug_infs(False),
            jax.check_tracer_leaks(False),
            jax.debug_key_reuse(False),
        ):
            stack.enter_context(setting)
        if matmul_precision:
            stack.enter_context(jax.default_matmul_precision(None))
        yield
