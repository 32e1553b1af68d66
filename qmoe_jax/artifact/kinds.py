"""Kinds of packing: each turns the digits and levels of a quantized matrix into stored parts, and back.

A kind is plain data in the manifest and in every group file. To add one, write a class with the methods of
`Kind` and list it in `KINDS`; a reader refuses every other name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeGuard

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8

from qmoe_jax.artifact.bits import pack_bits, packed_bytes, smallest_dtype, unpack_bits
from qmoe_jax.coding import Codebook, EncodedRows, decode, encode
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.quantization import Grid, ternary_grid, uniform_grid

Codebooks = Mapping[str, Codebook]
"""Codebooks by name."""

Parts = Mapping[str, np.ndarray]
"""The stored arrays of a packed matrix: see `PackedExpertMatrix`."""

LevelDtype = Literal["bfloat16", "float32"]

LEVEL_DTYPES: Mapping[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

PARTS = ("levels", "scales", "zeros", "column_group", "counts", "codes")
"""Names of the parts that a matrix may have; a reader refuses a part of another name."""


class Kind(Protocol):
    """Packing of a matrix [out, in], a frozen dataclass. Levels belong to a row or to a group of its columns.

    Attributes:
        name: name in the manifest.
        group_size: columns that share their levels; None for the whole row.
        level_dtype: dtype that levels are rounded to. bfloat16 is what upstream's models have.
    """

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def group_size(self) -> int | None: ...  # noqa: D102
    @property
    def level_dtype(self) -> LevelDtype: ...  # noqa: D102

    @property
    def grid(self) -> Grid:
        """The grid that gives digits their values."""
        ...

    def pack(
        self,
        digits: UInt8[np.ndarray, "out in"],
        levels: Float[np.ndarray, "out group 2"],
        codebooks: Codebooks,
    ) -> dict[str, np.ndarray]:
        """Return digits and levels as parts."""
        ...

    def digits(
        self, parts: Parts, shape: tuple[int, int], codebooks: Codebooks
    ) -> UInt8[np.ndarray, "out in"]:
        """Return the digits that `pack` was given.

        Raises:
            ValueError: the parts are damaged; `coding.CorruptStream` where codewords are.
        """
        ...

    def levels(
        self, parts: Parts
    ) -> tuple[Float32[np.ndarray, "out group"], Float32[np.ndarray, "out group"]]:
        """Return the two numbers, as the grid has them, of each row and group."""
        ...


@dataclasses.dataclass(frozen=True)
class Ternary:
    """Digits 0, 1, 2 for zero, minimum, maximum, written row after row as codewords of a codebook."""

    name: ClassVar[str] = "ternary"
    codebook: str
    group_size: int | None = None
    level_dtype: LevelDtype = "bfloat16"

    @property
    def grid(self) -> Grid:
        """The ternary grid."""
        return ternary_grid()

    def pack(
        self,
        digits: UInt8[np.ndarray, "out in"],
        levels: Float[np.ndarray, "out group 2"],
        codebooks: Codebooks,
    ) -> dict[str, np.ndarray]:
        """Return the parts `levels`, `counts`, `codes`."""
        encoded = encode(digits, self._codebook(codebooks))
        counts = np.diff(np.asarray(encoded.row_offsets))
        return {
            "levels": levels.astype(LEVEL_DTYPES[self.level_dtype]),
            "counts": counts.astype(smallest_dtype(counts)),
            "codes": np.asarray(encoded.codes),
        }

    def digits(
        self, parts: Parts, shape: tuple[int, int], codebooks: Codebooks
    ) -> UInt8[np.ndarray, "out in"]:
        """Decode every row to exactly `in` digits. Raises `coding.CorruptStream` where that is impossible."""
        return np.asarray(decode(self.encoded(parts), self._codebook(codebooks), shape[1]))

    def levels(
        self, parts: Parts
    ) -> tuple[Float32[np.ndarray, "out group"], Float32[np.ndarray, "out group"]]:
        """Return minimum and maximum."""
        stored = parts["levels"]
        levels = stored.astype(np.float32).reshape(len(stored), -1, 2)
        return levels[..., 0], levels[..., 1]

    def encoded(self, parts: Parts) -> EncodedRows:
        """Return the codewords with the offsets of rows among them, as `coding` reads them."""
        counts = parts["counts"]
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:], dtype=np.int64)
        if offsets[-1] != len(parts["codes"]):
            raise ValueError(f"expected {offsets[-1]} codewords, found {len(parts['codes'])}")
        return EncodedRows(parts["codes"], offsets.astype(np.int32))

    def _codebook(self, codebooks: Codebooks) -> Codebook:
        if self.codebook not in codebooks:
            raise ValueError(f"codebook: expected one of {sorted(codebooks)}, found {self.codebook!r}")
        return codebooks[self.codebook]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """k-bit digits, bit-packed along each row; a digit stands for (digit - zero point) * scale."""

    name: ClassVar[str] = "uniform"
    bits: int
    group_size: int | None = None
    level_dtype: LevelDtype = "bfloat16"

    @property
    def grid(self) -> Grid:
        """The uniform grid of `bits`."""
        return uniform_grid(self.bits)

    def pack(
        self,
        digits: UInt8[np.ndarray, "out in"],
        levels: Float[np.ndarray, "out group 2"],
        codebooks: Codebooks,
    ) -> dict[str, np.ndarray]:
        """Return the parts `scales`, `zeros` and `codes`.

        Raises:
            ValueError: a zero point is not an integer.
        """
        scales, zeros = levels[..., 0], levels[..., 1]
        if not np.array_equal(zeros, np.rint(zeros)):
            raise ValueError("zero points must be integers")
        return {
            "scales": scales.astype(LEVEL_DTYPES[self.level_dtype]),
            "zeros": zeros.astype(smallest_dtype(zeros)),
            "codes": pack_bits(digits, self.bits).reshape(-1),
        }

    def digits(
        self, parts: Parts, shape: tuple[int, int], codebooks: Codebooks
    ) -> UInt8[np.ndarray, "out in"]:
        """Unpack every row. Raises `ValueError` where the number of bytes does not fit the shape."""
        out, width = shape
        codes, expected = parts["codes"], out * packed_bytes(width, self.bits)
        if codes.size != expected:
            raise ValueError(f"expected {expected} bytes of digits, found {codes.size}")
        return unpack_bits(codes.reshape(out, -1), self.bits, width)

    def levels(
        self, parts: Parts
    ) -> tuple[Float32[np.ndarray, "out group"], Float32[np.ndarray, "out group"]]:
        """Return scale and zero point."""
        scales, zeros = parts["scales"], parts["zeros"]
        flat = lambda part: part.astype(np.float32).reshape(len(part), -1)
        return flat(scales), flat(zeros)


KINDS: Mapping[str, type[Ternary] | type[Uniform]] = {kind.name: kind for kind in (Ternary, Uniform)}

RESERVED = {"input_scaled": False}
"""Options that every kind has in the files and that have one value: room for a scale per input column."""


_OPTIONS: Mapping[str, Callable[[Any], bool]] = {
    "codebook": lambda value: type(value) is str,
    "bits": lambda value: type(value) is int and value in (2, 3, 4),
    "group_size": lambda value: value is None or (type(value) is int and value >= 1),
    "level_dtype": lambda value: type(value) is str and value in LEVEL_DTYPES,
}
"""The values that the options of kinds may have."""


def runs_packed(kind: Kind | None) -> TypeGuard[Ternary]:
    """Return whether the kernels multiply by this kind as it is: ternary, with one pair of levels per row."""
    return isinstance(kind, Ternary) and kind.group_size is None


def kind_to_json(kind: Kind) -> dict[str, Any]:
    """Return a kind as the manifest has it."""
    return {"name": kind.name, **dataclasses.asdict(kind), **RESERVED}


def kind_from_json(fields: Mapping[str, Any], path: object) -> Kind:
    """Return the kind that a manifest or a group file names; `path` is for the error.

    Raises:
        CheckpointError: the name or one of the options is unknown to this version.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"expected a kind of packing, found {type(fields).__name__}")
    name, options = str(fields.get("name")), {key: value for key, value in fields.items() if key != "name"}
    remedy = "read it with a newer version of qmoe_jax"
    if name not in KINDS:
        raise CheckpointError(
            "unknown kind of packing",
            path=path,
            expected=f"one of {sorted(KINDS)}",
            found=name,
            remedy=remedy,
        )
    known = {field.name for field in dataclasses.fields(KINDS[name])}
    reserved = {key: options.pop(key, None) for key in RESERVED}
    fits = options.keys() == known and all(_OPTIONS[key](value) for key, value in options.items())
    if not fits or reserved != RESERVED:
        raise CheckpointError(
            "unknown options of packing",
            path=path,
            key=name,
            expected=f"{sorted(known)} in range, level_dtype one of {sorted(LEVEL_DTYPES)}, {RESERVED}",
            found=options | reserved,
            remedy=remedy,
        )
    return KINDS[name](**options)


def num_groups(kind: Kind, width: int) -> int:
    """Return the number of groups in a row of `width` columns."""
    return 1 if kind.group_size is None else -(-width // kind.group_size)
