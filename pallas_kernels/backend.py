"""Which implementation of an op runs: the only module that names a Pallas backend or a platform.

An op is a folder; each of its faces is a file with a function of the op's name. `face` finds the one to run.
A backend that is named runs or says why it cannot; without a name the platform's list is walked.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax

ORDER = {"cpu": ("cpu", "reference"), "gpu": ("pallas", "reference")}
BACKENDS = ("reference", "pallas", "cpu")


def platform() -> str:
    """Where arrays go by default: 'cpu', 'gpu', 'tpu', ..."""
    device: Any = jax.config.values["jax_default_device"]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def refusal(op: str, backend: str, *, interpret: bool = False) -> str | None:
    """Why `backend` cannot run `op` here, or None where it can."""
    here = platform()
    if backend not in BACKENDS:
        return f"there is no backend of that name, only {', '.join(BACKENDS)}"
    if importlib.util.find_spec(f"pallas_kernels.{op}.{backend}") is None:
        return f"{op} has no such implementation"
    if backend == "cpu":
        return _cpu_refusal(here)
    if backend == "pallas" and here != "gpu" and not interpret:
        return (
            f"its kernels are for NVIDIA GPUs and arrays are on {here} here; interpret=True runs them slowly"
        )
    return None


def _cpu_refusal(here: str) -> str | None:
    if here != "cpu":
        return f"it computes in host memory and arrays are on {here} here"
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return None


def choose(op: str, backend: str | None = None, *, interpret: bool = False) -> str:
    """The backend to run `op` with.

    Raises:
      NotImplementedError: the named backend cannot run here, or none can; says why.
    """
    if interpret and backend != "pallas":
        raise NotImplementedError(f"{op}: interpret=True needs backend='pallas', found {backend!r}")
    if backend is not None:
        if reason := refusal(op, backend, interpret=interpret):
            raise NotImplementedError(f"{op}: backend {backend!r} cannot run: {reason}")
        return backend
    refusals: dict[str, str] = {}
    for candidate in ORDER.get(platform(), ("reference",)):
        reason = refusal(op, candidate)
        if reason is None:
            _say_once(refusals, candidate)
            return candidate
        refusals[candidate] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise NotImplementedError(f"{op}: no backend can run: {reasons}")


def face(op: str, backend: str | None = None, *, interpret: bool = False) -> Callable[..., Any]:
    """The function that runs `op`; raises as `choose` does."""
    chosen = choose(op, backend, interpret=interpret)
    function = getattr(importlib.import_module(f"pallas_kernels.{op}.{chosen}"), op)
    return functools.partial(function, interpret=interpret) if chosen == "pallas" else function


def _say_once(refusals: dict[str, str], chosen: str) -> None:
    """A warning where the fast implementation is passed over, once for each reason."""
    for name, reason in refusals.items():
        if (name, reason) not in _said:
            _said.add((name, reason))
            warnings.warn(f"{name!r} kernels are not used, {chosen!r} instead: {reason}", stacklevel=4)


_said: set[tuple[str, str]] = set()


def triton_parameters(*, num_warps: int, num_stages: int = 1) -> Any:
    """Compiler parameters that select Pallas' Triton backend: without them jax 0.10 takes Mosaic GPU.

    Mosaic GPU has no gathers, which these kernels live on.
    """
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
