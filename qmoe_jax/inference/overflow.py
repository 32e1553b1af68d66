"""Finds where a model's numbers first are not finite, once its logits are known not to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
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

    Runs the model once more, compiled with one flag for each output of its modules.
    """
    paths: list[str] = []

    @jax.jit
    def finite(
        params: dict[str, Any],
        encoder: Int[Array, "b n"],
        decoder: Int[Array, "b m"],
        mask: Bool[Array, "b n"] | None,
    ) -> Bool[Array, "output"]:
        _, captured = model.apply(
            {"params": params}, encoder, decoder, mask, capture_intermediates=True, mutable=["intermediates"]
        )
        parts = list(_parts(captured["intermediates"], ()))
        paths[:] = [path for path, _ in parts]
        return jnp.stack([jnp.isfinite(array).all() for _, array in parts])

    flags = np.asarray(finite(params, encoder, decoder, mask))
    where = "the logits" if flags.all() else paths[int(flags.argmin())]
    return (
        f"{where}: the model's numbers are not finite in {np.dtype(model.dtype)} from there on: expected "
        "finite logits; its weights are too large: the checkpoint is damaged or its training diverged; "
        "take another copy"
    )


def _parts(outputs: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Array]]:
    """Yield the floating-point outputs of modules with the modules' paths, in the order of the calls."""
    for name, value in outputs.items():
        if isinstance(value, Mapping):
            yield from _parts(value, (*path, name))
        else:
            where = "/".join(path if name == "__call__" else (*path, name))
            yield from ((where, array) for array in _floats(value))


def _floats(value: Any) -> list[Array]:
    """Return the arrays of floating-point numbers in the outputs of a module's calls."""
    if isinstance(value, tuple | list):
        return [array for part in value for array in _floats(part)]
    return [value] if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating) else []
