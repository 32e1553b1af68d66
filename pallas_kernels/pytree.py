"""Registers frozen dataclasses as pytrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def register(*, leaves: tuple[str, ...], static: tuple[str, ...]) -> Callable[[type[T]], type[T]]:
    """Register a dataclass as a pytree of its fields `leaves`; the fields `static` are compared, not traced.

    Unflattening skips `__init__`, and so its type checks: jax puts axes, shardings and None in place of
    arrays.
    """

    def decorate(cls: type[T]) -> type[T]:
        def flatten(value: T) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
            keyed = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in leaves]
            return keyed, tuple(getattr(value, name) for name in static)

        def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> T:
            value = object.__new__(cls)
            for name, field in (*zip(leaves, children, strict=True), *zip(static, aux, strict=True)):
                object.__setattr__(value, name, field)
            return value

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return decorate
