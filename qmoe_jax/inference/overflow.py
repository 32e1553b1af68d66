"""Finds where a model's numbers first are not finite, once its logits are known not to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.operands import AnyArray
from qmoe_jax.models import SwitchTransformer


def describe_overflow(
    model: SwitchTransformer,
    params: dict[str, Any],
    encoder: Int[AnyArray, "b n"],
    decoder: Int[AnyArray, "b m"],
    mask: Bool[Array, "b n"] | None = None,
) -> str:
    """Return a message that names the first part of the model whose output is not finite.

    Runs the model once more, without jit, and keeps the outputs of all of its modules.
    """
    _, captured = model.apply(
        {"params": params}, encoder, decoder, mask, capture_intermediates=True, mutable=["intermediates"]
    )
    where = _first(captured["intermediates"], ()) or "the logits"
    return (
        f"{where}: the model's numbers are not finite in {np.dtype(model.dtype)} from there on: expected "
        "finite logits; its weights are too large: the checkpoint is damaged or its training diverged; "
        "take another copy"
    )


def _first(outputs: Mapping[str, Any], path: tuple[str, ...]) -> str | None:
    """Return the path of the first module with an output that is not finite, in the order of the calls."""
    for name, value in outputs.items():
        if isinstance(value, Mapping):
            if found := _first(value, (*path, name)):
                return found
        elif not all(np.isfinite(np.asarray(part, np.float32)).all() for part in _floats(value)):
            return "/".join(path if name == "__call__" else (*path, name))
    return None


def _floats(value: Any) -> list[Array]:
    """Return the arrays of floating-point numbers in the outputs of a module's calls."""
    if isinstance(value, tuple | list):
        return [array for part in value for array in _floats(part)]
    return [value] if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating) else []
