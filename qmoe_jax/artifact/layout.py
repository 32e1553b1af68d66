"""The stored parts of a packed matrix: which there are, of which dtype and shape, by its kind and shape."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qmoe_jax.artifact.kinds import LEVEL_DTYPES, Kind, Ternary, num_groups

_BYTES = (np.dtype(np.uint8),)
_COUNTS = tuple(map(np.dtype, ("uint8", "uint16", "uint32")))
_ZEROS = tuple(map(np.dtype, ("uint8", "uint16", "uint32", "int16", "int32")))

StoredAs = tuple[np.dtype, tuple[int, ...]]
"""Dtype and shape of a part; of the codes, whose number differs between experts, any shape."""


def check_layout(kind: Kind, shape: tuple[int, int], parts: Mapping[str, StoredAs]) -> None:
    """Check that the parts of a matrix [out, in] are those that `kind` stores of it.

    Raises:
        ValueError: a part is missing, unknown, or of another dtype or shape.
    """
    out, width = shape
    if out < 1 or width < 1:
        raise ValueError(f"expected a matrix of at least one row and column, found {shape}")
    groups = () if kind.group_size is None else (num_groups(kind, width),)
    levels = (LEVEL_DTYPES[kind.level_dtype],)
    if isinstance(kind, Ternary):
        expected = {"levels": (levels, (out, *groups, 2)), "counts": (_COUNTS, (out,))}
        codes: tuple[np.dtype, ...] = (*_BYTES, np.dtype(np.uint16))
    else:
        expected = {"scales": (levels, (out, *groups)), "zeros": (_ZEROS, (out, *groups))}
        codes = _BYTES
    if "column_group" in parts:
        expected["column_group"] = _COUNTS, (width,)
    if parts.keys() != expected.keys() | {"codes"}:
        raise ValueError(f"expected the parts {[*expected, 'codes']}, found {[*parts]}")
    for name, (dtypes, part_shape) in expected.items():
        dtype, found = parts[name]
        if dtype not in dtypes or found != part_shape:
            raise ValueError(f"{name}: expected {dtypes[0]} {part_shape}, found {dtype} {found}")
    if parts["codes"][0] not in codes:
        raise ValueError(f"codes: expected {' or '.join(map(str, codes))}, found {parts['codes'][0]}")
