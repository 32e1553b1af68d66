"""The implementations of the ops, the cases they are tested on, and the bound that products must keep."""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import reference, routes
from tests.helpers import packed_samples as samples

NEVER = 10**9

BACKENDS = ("reference", "cpu", "pallas_interpret")

# Route of the Pallas product: the crossovers that send any number of tokens through it, and its kernel.
PALLAS_ROUTES = {
    "separate": (routes.RouteConfig(NEVER, NEVER), "packed_matmul_separate"),
    "gather": (routes.RouteConfig(0, NEVER), "packed_matmul_gather"),
    "tensor_core": (routes.RouteConfig(0, 0), "packed_matmul_tensor_core"),
}


def pallas_route(name: str, **options):
    """Return `packed_matmul` by one Pallas kernel; `options` are its own and those of `routes.Overrides`."""
    configs = {kind: options.pop(kind) for kind in PALLAS_ROUTES if kind in options}
    overrides = routes.Overrides(route=PALLAS_ROUTES[name][0], **configs)
    return functools.partial(routes.packed_matmul, overrides=overrides, **options)


# Implementations of `packed_matmul`, as its argument `backend`; tensor cores have their own tests
# (test_routes).
IMPLEMENTATIONS = {
    "reference-separate": reference.separate,
    "reference-grouped": reference.grouped,
    "cpu": "cpu",
    "pallas-separate": pallas_route("separate", interpret=True),
    "pallas-gather": pallas_route("gather", interpret=True),
}

# (codebook, (experts, out, in), tokens). Every codebook on a shape that is not a multiple of anything; the
# first one also on the extremes: single elements, rows shorter than a codeword, many tokens.
CASES = {
    "tunstall-8-one": ("tunstall-8", (1, 1, 1), 1),
    "tunstall-8-short": ("tunstall-8", (2, 3, 5), 4),
    "tunstall-8-many": ("tunstall-8", (2, 5, 64), 75),
    **{name: (name, (3, 7, 131), 9) for name in samples.CODEBOOKS},
}


def assert_products(found, sample, x, expert_index, *, bound=1e-6, units=0.5):
    """Assert that products are within `bound` of the sum of |w x|, plus the rounding of the output.

    That is `units` of the output's last place.
    """
    exact, magnitude = samples.products(sample, x, expert_index)
    assert found.dtype == x.dtype
    rounding = units * jnp.finfo(x.dtype).eps * np.abs(exact)
    assert (np.abs(np.asarray(found, np.float64) - exact) <= bound * magnitude + rounding + 1e-30).all()
