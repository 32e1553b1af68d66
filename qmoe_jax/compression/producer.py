"""The software and the machine that decide a run's digits: no run goes on with others unnoticed.

The same inputs give the same bytes on any number of cores. Another device, instruction set or version rounds
differently, and a digit in a hundred may differ.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import scipy.linalg  # noqa: F401 (loads the BLAS whose kernels are named below)
from threadpoolctl import threadpool_info

from qmoe_jax.files.errors import CheckpointError

Producer = Mapping[str, str]
"""Each thing that decides digits beside the inputs, by name."""

PACKAGES = ("qmoe-jax", "jax", "jaxlib", "numpy", "scipy", "numba")

INSTRUCTION_SETS = ("fma", "avx", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
"""Features of a processor by which XLA and BLAS choose their kernels, as Linux names them."""

HARMLESS_FLAGS = re.compile(r"--xla_(dump|force_host_platform_device_count)")
"""Flags of XLA that change no digit."""


def this_producer() -> dict[str, str]:
    """Return the software and the machine of this process."""
    device = jax.devices()[0]
    found = {package: _version(package) for package in PACKAGES}
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["device"] = f"{device.platform} {device.device_kind}"
    if device.platform != "cpu":
        found["driver"] = device.client.platform_version.replace("\n", " ")
    found["instruction set"] = _instruction_set(Path("/proc/cpuinfo"))
    found["BLAS"] = ", ".join(
        sorted({_blas(pool) for pool in threadpool_info() if pool["user_api"] == "blas"})
    )
    flags = shlex.split(os.environ.get("XLA_FLAGS", ""))
    found["XLA flags"] = " ".join(sorted(flag for flag in flags if not HARMLESS_FLAGS.match(flag)))
    found["matmul precision"] = str(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
    return found


def require_producer(ours: Producer, earlier: Iterable[Producer], path: object) -> None:
    """Check that the finished groups at `path` were made by what would make the others.

    Raises:
        CheckpointError: they were not; says in what they differ.
    """
    for theirs in earlier:
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if names:
            raise CheckpointError(
                "has groups that were made by other software or on another machine",
                path=path,
                expected=", ".join(f"{name} {theirs.get(name)!r}" for name in names),
                found=", ".join(f"{name} {ours.get(name)!r}" for name in names),
                remedy="resume with the software and on a machine as expected; or allow an artifact of both, "
                "whose bytes no single machine gives (--allow-mixed, allow_mixed=True); or choose another "
                "output directory",
            )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _instruction_set(cpuinfo: Path) -> str:
    """Return the features of the processor that decide digits; its name where they cannot be read."""
    try:
        line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        line = None
    features = set(line[1].split()) if line else set()
    return " ".join(name for name in INSTRUCTION_SETS if name in features) or platform.processor()


def _blas(pool: Mapping[str, str]) -> str:
    return f"{pool['internal_api']} {pool['version']} {pool.get('architecture', '')}".strip()
