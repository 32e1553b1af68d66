"""Chooses the implementation of an op: the only module that knows backends, platforms and their versions.

An op is a folder. Its `op.py` holds the public function and an `Op`, which says how to import the
implementation for each backend. A backend that is named runs or raises with the reason why it cannot; without
a name, the backends of the platform are tried in order.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.availability import (
    default_platform,
    describe_error,
    import_refusal,
    missing_gpu,
    version,
)

Implementation = Callable[..., Any]

ORDER = {"cpu": ("cpu", "reference"), "gpu": ("pallas", "jax_triton", "reference")}
BACKENDS = ("reference", "pallas", "pallas_interpret", "jax_triton", "cpu")

# Versions tested together: {jax-triton: {package: (from, below)}}. A newer jax-triton is not refused.
TRITON_PAIRS = {
    (0, 3): {"jax": ((0, 10), (0, 12)), "triton": ((3, 6), (3, 7))},
    (0, 4): {"jax": ((0, 11), (0, 12)), "triton": ((3, 7), (3, 9))},
}


@dataclasses.dataclass(frozen=True)
class Op:
    """An op and its implementations.

    Attributes:
        name: the public function.
        load: for each backend, a function that imports and returns the implementation. Importing may need an
            optional package, so it happens when the backend is first chosen. The entry of "pallas" serves
            "pallas_interpret" too.
    """

    name: str
    load: Mapping[str, Callable[[], Implementation]]


def platform() -> str:
    """Return the platform that programs are compiled for: 'cpu', 'gpu', 'tpu', ...

    It is that of the abstract device where a program is lowered for one (`jax.sharding.AbstractDevice`), else
    that of jax's default device.

    Raises:
        NotImplementedError: jax cannot start the platform that it is told to use.
    """
    if (abstract := _abstract_device()) is not None:
        return abstract.platform
    device: Any = jax.config.values["jax_default_device"]
    if device is None:
        return default_platform()
    return device if isinstance(device, str) else device.platform


def device_kind() -> str:
    """Return the kind of the device that programs are compiled for: 'NVIDIA H100 80GB HBM3', 'cpu', ..."""
    if (abstract := _abstract_device()) is not None:
        return abstract.device_kind
    return jax.devices()[0].device_kind


def _abstract_device() -> Any:
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None and device.platform is not None else None


def refusal(op: Op, backend: str) -> str | None:
    """Return why `backend` cannot run `op` here, or None if it can."""
    if backend not in BACKENDS:
        return f"unknown backend; the backends are {', '.join(BACKENDS)}"
    if _entry(backend) not in op.load:
        return f"{op.name} has no implementation for it"
    here = platform()
    if backend == "cpu":
        return _cpu_refusal(here)
    if backend == "pallas":
        return _nvidia_refusal(here) or _pallas_refusal()
    if backend == "pallas_interpret":
        return _pallas_refusal()
    if backend == "jax_triton":
        return _nvidia_refusal(here) or _jax_triton_refusal()
    return None


def _entry(backend: str) -> str:
    return "pallas" if backend == "pallas_interpret" else backend


def _nvidia_refusal(here: str) -> str | None:
    if here == "gpu":
        return None
    chosen = _abstract_device() or jax.config.values["jax_default_device"]
    reason = f"the program is for {chosen}" if chosen is not None else missing_gpu()
    return f"requires an NVIDIA GPU; the default platform is {here}: {reason}"


def _pallas_refusal() -> str | None:
    try:
        from jax.experimental.pallas import triton
    except Exception as error:  # absent, or whatever a broken installation raises
        return f"jax {jax.__version__} has no Triton backend under Pallas ({describe_error(error)})"
    if not hasattr(triton, "CompilerParams"):
        return f"jax {jax.__version__} has no Triton backend under Pallas"
    return None


def _jax_triton_refusal() -> str | None:
    versions = {name: version(name) for name in ("jax", "triton", "jax-triton")}
    if missing := [name for name, found in versions.items() if found is None]:
        return f"{' and '.join(missing)} not installed: pip install 'qmoe-jax[jax-triton]'"
    for name, (least, below) in TRITON_PAIRS.get(_series(versions["jax-triton"]), {}).items():
        if not least <= _series(versions[name]) < below:
            wanted = f">={'.'.join(map(str, least))},<{'.'.join(map(str, below))}"
            return f"jax-triton {versions['jax-triton']} requires {name}{wanted}, found {versions[name]}"
    # It fails, for example, with a jaxlib without GPU support.
    shown = f"jax-triton {versions['jax-triton']}"
    return import_refusal("jax_triton", shown, install="'qmoe-jax[jax-triton]'")


def _series(found: str | None) -> tuple[int, int]:
    major, minor = (found or "0.0").split(".")[:2]
    return int(major), int(minor)


def _cpu_refusal(here: str) -> str | None:
    if here != "cpu":
        return f"computes in host memory; the default platform is {here}"
    if reason := import_refusal("numba", install="numba"):
        return reason
    from pallas_kernels.cpu.xla_c_api import version_refusal

    return version_refusal()


def choose_backend(op: Op, backend: str | None = None) -> str:
    """Return the backend that runs `op`: the named one, or the first of the platform's that can.

    Warns once for each reason that a faster backend is passed over.

    Raises:
        NotImplementedError: the named backend cannot run here, or none can; the message has the reasons.
    """
    if backend is not None:
        if reason := refusal(op, backend):
            raise NotImplementedError(f"{op.name}: backend {backend!r} cannot run: {reason}")
        return backend
    refusals: dict[str, str] = {}
    for candidate in ORDER.get(platform(), ("reference",)):
        reason = refusal(op, candidate)
        if reason is None:
            _warn_once(refusals, candidate)
            return candidate
        refusals[candidate] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise NotImplementedError(f"{op.name}: no backend can run: {reasons}")


def get_implementation(op: Op, backend: str | Implementation | None = None) -> Implementation:
    """Return the implementation of `op` for a backend; a function in its place is returned as it is.

    Raises:
        NotImplementedError: as `choose_backend` does.
    """
    if callable(backend):
        return backend
    chosen = choose_backend(op, backend)
    implementation = op.load[_entry(chosen)]()
    if chosen == "pallas_interpret":
        implementation = functools.partial(implementation, interpret=True)
    return in_32_bits(implementation)


def in_32_bits(implementation: Implementation) -> Implementation:
    """Return the implementation, traced as if 64 bits were not enabled.

    Operands have their dtypes, and what jax counts by itself (Pallas the tiles of a loop, `jnp.arange`) has
    32 bits in every process.
    """

    @functools.wraps(implementation)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(False):
            return implementation(*args, **kwargs)

    return run


def _warn_once(refusals: dict[str, str], chosen: str) -> None:
    for name, reason in refusals.items():
        if (name, reason) not in _warned:
            _warned.add((name, reason))
            message = f"the {name!r} kernels are not used, {chosen!r} is used instead: {reason}"
            warnings.warn(message, stacklevel=4)


_warned: set[tuple[str, str]] = set()


def triton_parameters(*, num_warps: int, num_stages: int = 1) -> Any:
    """Return compiler parameters that select Pallas' Triton backend: without them jax 0.10 uses Mosaic GPU.

    Mosaic GPU has no gathers, on which these kernels depend.
    """
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
