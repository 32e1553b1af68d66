"""Packed matrices across a host call: arrays as arguments, the rest as integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.operands import AnyArray, DecodeTable, PackedMatrix

NUM_ARRAYS = 4


def arrays_of(packed: PackedMatrix) -> tuple[AnyArray, ...]:
    """The arrays, `NUM_ARRAYS` of them, in the order of `rebuilt`."""
    return packed.codes, packed.row_offsets, packed.levels, packed.table.entries


def integers_of(packed: PackedMatrix, name: str) -> dict[str, int]:
    """What is static, each under the matrix's `name`."""
    table = packed.table
    values = {
        "width": packed.width,
        "bits": table.field_bits,
        "slots": table.slots,
        "longest": table.max_length,
    }
    return {f"{name}_{key}": value for key, value in values.items()}


def rebuilt(arrays: Sequence[np.ndarray], integers: Mapping[str, Any], name: str) -> PackedMatrix:
    """The matrix again, its arrays now NumPy's."""
    codes, row_offsets, levels, entries = arrays
    bits, slots, longest = (integers[f"{name}_{key}"] for key in ("bits", "slots", "longest"))
    table = DecodeTable(entries, bits, slots, longest)
    return PackedMatrix(codes, row_offsets, levels, table, integers[f"{name}_width"])
