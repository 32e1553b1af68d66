"""Which implementation of an op runs: the only module that knows Pallas backends, platforms and versions.

An op is a folder; each of its faces is a file with a function of the op's name. `face` finds the one to run.
A backend that is named runs or says why it cannot; without a name the platform's list is walked.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax

ORDER = {"cpu": ("cpu", "reference"), "gpu": ("pallas", "jax_triton", "reference")}
BACKENDS = ("reference", "pallas", "jax_triton", "cpu")

# Versions tried together: {jax-triton: {package: (from, below)}}. A newer jax-triton is given a chance.
TRITON_PAIRS = {
    (0, 3): {"jax": ((0, 10), (0, 12)), "triton": ((3, 6), (3, 7))},
    (0, 4): {"jax": ((0, 11), (0, 12)), "triton": ((3, 7), (3, 9))},
}


def platform() -> str:
    """Where arrays go: 'cpu', 'gpu', 'tpu', ...

    Of an absent machine that a program is lowered for (`jax.sharding.AbstractDevice`), else by default.
    """
    if (absent := _absent_device()) is not None:
        return absent.platform
    device: Any = jax.config.values["jax_default_device"]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def device_kind() -> str:
    """The kind of device that `platform` speaks of: 'NVIDIA H100 80GB HBM3', 'cpu', ..."""
    if (absent := _absent_device()) is not None:
        return absent.device_kind
    return jax.devices()[0].device_kind


def _absent_device() -> Any:
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None and device.platform is not None else None


def refusal(op: str, backend: str, *, interpret: bool = False) -> str | None:
    """Why `backend` cannot run `op` here, or None where it can."""
    here = platform()
    if backend not in BACKENDS:
        return f"there is no backend of that name, only {', '.join(BACKENDS)}"
    if importlib.util.find_spec(f"pallas_kernels.{op}.{backend}") is None:
        return f"{op} has no such implementation"
    if backend == "cpu":
        return _cpu_refusal(here)
    if backend == "pallas":
        return _pallas_refusal(here, interpret)
    if backend == "jax_triton":
        return _jax_triton_refusal(here)
    return None


def _pallas_refusal(here: str, interpret: bool) -> str | None:
    try:
        from jax.experimental.pallas import triton
    except ImportError as error:
        return f"jax {jax.__version__} has no Triton backend under Pallas ({error})"
    if not hasattr(triton, "CompilerParams"):
        return f"jax {jax.__version__} has no Triton backend under Pallas"
    if here != "gpu" and not interpret:
        return (
            f"its kernels are for NVIDIA GPUs and arrays are on {here} here; interpret=True runs them slowly"
        )
    return None


def _jax_triton_refusal(here: str) -> str | None:
    if here != "gpu":
        return f"its kernels are for NVIDIA GPUs and arrays are on {here} here"
    versions = {name: _version(name) for name in ("jax", "triton", "jax-triton")}
    if missing := [name for name, version in versions.items() if version is None]:
        return f"{' and '.join(missing)} cannot be found: pip install 'qmoe-jax[jax-triton]'"
    for name, (least, below) in TRITON_PAIRS.get(_series(versions["jax-triton"]), {}).items():
        if not least <= _series(versions[name]) < below:
            wanted = f">={'.'.join(map(str, least))},<{'.'.join(map(str, below))}"
            return f"jax-triton {versions['jax-triton']} goes with {name}{wanted}, found {versions[name]}"
    try:
        importlib.import_module("jax_triton")
    except ImportError as error:  # a jaxlib without GPUs, for one
        return f"jax-triton {versions['jax-triton']} cannot be imported ({error})"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _series(version: str | None) -> tuple[int, int]:
    major, minor = (version or "0.0").split(".")[:2]
    return int(major), int(minor)


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
    module = importlib.import_module(f"pallas_kernels.{op}.{chosen}")
    function = getattr(module, {"matmul": "packed_matmul", "mlp": "packed_mlp"}.get(op, op))
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
