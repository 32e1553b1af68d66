"""Reasons why packages and GPUs cannot be used here, as they are: absent is told from broken."""

from __future__ import annotations

import glob
import importlib
import importlib.metadata
import os
from typing import Any

import jax

CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
GPU_FILES = ("/dev/nvidia[0-9]*", "/dev/dxg")
"""Devices of NVIDIA's driver, on Linux and under WSL."""


def import_refusal(module: str, shown: str | None = None, *, install: str) -> str | None:
    """Return why a module cannot be imported, or None if it can.

    Args:
        module: its name.
        shown: its name and version in the reason; by default its name.
        install: what to pass to `pip install` where it is absent.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module and version(module) is None:
            return f"{shown or module} cannot be imported: it is not installed (pip install {install})"
        return f"{shown or module} cannot be imported ({describe_error(error)})"
    except Exception as error:  # whatever a broken installation raises
        return f"{shown or module} cannot be imported ({describe_error(error)})"
    return None


def describe_error(error: Exception) -> str:
    """Return the kind of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def default_platform() -> str:
    """Return the platform of jax's default backend.

    Raises:
        NotImplementedError: jax cannot start the platform that it is told to use.
    """
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter for a plug-in that is not installed
        platforms = _chosen_platforms()
        causes = [describe_error(error)] if str(error) else []
        if platforms and "cuda" in platforms:
            causes.append(missing_gpu())
        raise NotImplementedError(
            f"jax cannot start the platform {platforms!r} (JAX_PLATFORMS): {'; '.join(causes)}"
        ) from error


def _chosen_platforms() -> str | None:
    """Return the platforms that the environment or the program chose, separated by commas, or None."""
    platforms: Any = jax.config.values["jax_platforms"]
    return platforms


def missing_gpu() -> str:
    """Return why programs do not run on an NVIDIA GPU."""
    platforms = _chosen_platforms()
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return f"jax is told to use {platforms} (JAX_PLATFORMS)"
    if not any(map(glob.glob, GPU_FILES)):
        return "no NVIDIA GPU is visible (no /dev/nvidia0)"
    if not any(map(version, CUDA_PLUGINS)):
        return "jax has no CUDA plug-in (pip install 'qmoe-jax[cuda]')"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible} hides every GPU"
    from jax._src import xla_bridge  # jax has no public name for it

    errors = getattr(xla_bridge, "_backend_errors", {})
    return f"jax's CUDA plug-in did not start ({errors.get('cuda', 'jax does not say why')})"
