"""Packed matrices as operands of a `HostFunction`: arrays as arguments, the rest as static integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.operands import AnyArray, DecodeTable, PackedMatrix

NUM_ARRAYS = 4


def packed_arrays(packed: PackedMatrix) -> tuple[AnyArray, ...]:
    """Return the `NUM_ARRAYS` arrays of a matrix, in the order that `packed_from` takes."""
    return packed.codes, packed.row_offsets, packed.levels, packed.table.entries


def packed_integers(packed: PackedMatrix, name: str) -> dict[str, int]:
    """Return the static parts of a matrix, each under a key that begins with the matrix's `name`."""
    table = packed.table
    return {
        f"{name}_width": packed.width,
        f"{name}_field_bits": table.field_bits,
        f"{name}_slots": table.slots,
        f"{name}_max_length": table.max_length,
    }


def packed_from(arrays: Sequence[np.ndarray], integers: Mapping[str, Any], name: str) -> PackedMatrix:
    """Return the matrix again, over the NumPy arrays that the function was called with."""
    codes, row_offsets, levels, entries = arrays
    field_bits, slots, max_length = (
        integers[f"{name}_{key}"] for key in ("field_bits", "slots", "max_length")
    )
    table = DecodeTable(entries, field_bits, slots, max_length)
    return PackedMatrix(codes, row_offsets, levels, table, integers[f"{name}_width"])
