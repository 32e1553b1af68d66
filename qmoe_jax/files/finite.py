"""Numbers that are not finite, found where they lie: NaN and infinity in arrays that were read or cast.

A model with one such weight computes nothing, and a compression would carry it into every later layer. So
arrays are checked as they are read, at about the speed of memory.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qmoe_jax.files.errors import CheckpointError

CHUNK = 1 << 16
"""Elements looked at together: masks of this size stay in a core's cache."""

REMEDY = "the model is damaged or its training diverged: take an earlier or another copy of the checkpoint"


def first_not_finite(array: np.ndarray) -> tuple[int, ...] | None:
    """Return the index of the first NaN or infinity, in the order of the axes; None where all are finite.

    Arrays of integers are finite. Memory: masks of `CHUNK` elements, and a copy of an array that is not
    contiguous.
    """
    if not is_float(array.dtype):
        return None
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, CHUNK):
        bad = _not_finite(flat[start : start + CHUNK])
        if bad.any():
            place = np.unravel_index(start + int(bad.argmax()), array.shape)
            return tuple(int(index) for index in place)
    return None


def is_float(dtype: npt.DTypeLike) -> bool:
    """Return whether the dtype is a floating-point one, of NumPy's or of ml_dtypes'."""
    try:
        ml_dtypes.finfo(np.dtype(dtype))
    except ValueError:
        return False
    return True


def require_finite(
    array: np.ndarray, *, path: object, key: str, first: int | None = None, row: int = 0
) -> np.ndarray:
    """Return the array, all of whose numbers are finite.

    Args:
        array: what was read.
        path: where it was read from, for the error.
        key: its name.
        first: number of the expert that the first row belongs to; None where rows are not experts.
        row: number of the first row, where rows are not experts.

    Raises:
        CheckpointError: a number is NaN or infinite; it names the position and the value.
    """
    if (place := first_not_finite(array)) is None:
        return array
    where = (place[0] + row, *place[1:]) if place and first is None else place
    raise CheckpointError(
        "holds a number that is not finite",
        path=path,
        key=_where(key, where, first),
        expected="finite numbers",
        found=f"{float(array[place])}, {array.dtype}",
        remedy=REMEDY,
    )


def cast(
    array: np.ndarray, dtype: npt.DTypeLike, *, path: object, key: str, first: int | None = None
) -> np.ndarray:
    """Return the array in another dtype, in which every finite number stays finite; others are copied.

    Takes no copy where the dtype is the array's own. Arguments as in `require_finite`.

    Raises:
        CheckpointError: a number is beyond the range of `dtype`; it names the position and the value.
    """
    wanted = np.dtype(dtype)
    if wanted == array.dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(wanted)
    if holds_range_of(wanted, array.dtype) or first_not_finite(result) is None:
        return result
    overflowed = ~_not_finite(array) & _not_finite(result)
    if overflowed.any():
        place = tuple(int(index) for index in np.argwhere(overflowed)[0])
        raise CheckpointError(
            f"holds a number beyond the range of {wanted}",
            path=path,
            key=_where(key, place, first),
            expected=f"at most {float(ml_dtypes.finfo(wanted).max):.4g} in size",
            found=f"{float(array[place])}, {array.dtype}",
            remedy=f"choose a wider dtype than {wanted}",
        )
    return result


def read_as(
    array: np.ndarray, dtype: npt.DTypeLike, *, path: object, key: str, first: int | None = None
) -> np.ndarray:
    """Return what was read in the dtype to compute in, all finite: `require_finite`, then `cast`."""
    require_finite(array, path=path, key=key, first=first)
    return cast(array, dtype, path=path, key=key, first=first)


def holds_range_of(wide: npt.DTypeLike, narrow: npt.DTypeLike) -> bool:
    """Return whether no finite number of `narrow` overflows in `wide`."""
    if not (is_float(wide) and is_float(narrow)):
        return True
    wide, narrow = ml_dtypes.finfo(np.dtype(wide)), ml_dtypes.finfo(np.dtype(narrow))
    # The largest float32 rounds up to infinity in bfloat16.
    return float(wide.max) >= float(narrow.max)


def _where(key: str, place: tuple[int, ...], first: int | None) -> str:
    if first is not None:
        key, place = f"{key}, expert {first + place[0]}", place[1:]
    return f"{key}, element [{', '.join(map(str, place))}]" if place else key


def _not_finite(array: np.ndarray) -> np.ndarray:
    """Return the mask of what is NaN or infinite; of short floats by their bits, which is faster."""
    dtype = array.dtype
    if not dtype.isnative:
        return ~np.isfinite(array)
    if dtype.itemsize == 1:
        every = np.arange(256, dtype=np.uint8).view(dtype)
        return ~np.isfinite(every)[array.view(np.uint8)]
    if dtype.itemsize == 2:
        info = ml_dtypes.finfo(dtype)
        exponent = np.uint16(((1 << (15 - info.nmant)) - 1) << info.nmant)
        return (array.view(np.uint16) & exponent) == exponent
    return ~np.isfinite(array)
