"""Settings of jax as a caller may have them."""

import contextlib

import jax

STRICT = {
    "64 bits": lambda: jax.enable_x64(True),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
}
"""Those that a program traced under them must state its dtypes and ranks for."""

DEBUG = {
    "random bits": lambda: jax.threefry_partitionable(False),
    "generator": lambda: jax.default_prng_impl("rbg"),
    "transfers": lambda: jax.transfer_guard("disallow"),
    "no jit": lambda: jax.disable_jit(True),
    "NaN": lambda: jax.debug_nans(True),
    "infinities": lambda: jax.debug_infs(True),
    "leaks": lambda: jax.check_tracer_leaks(True),
    "keys": lambda: jax.debug_key_reuse(True),
}


@contextlib.contextmanager
def every_setting(settings=STRICT | DEBUG):
    """Enter them all."""
    with contextlib.ExitStack() as stack:
        for setting in settings.values():
            stack.enter_context(setting())
        yield
