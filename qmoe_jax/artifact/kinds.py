"""How a quantized matrix is packed: each kind turns digits and levels into stored parts, and back.

A kind is plain data in the manifest and in every group file. To add one, write a class with the methods of
`Kind` and list it in `KINDS`; a reader refuses every other name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from qmoe_jax.artifact.bits import pack_bits, packed_bytes, smallest_dtype, unpack_bits
from qmoe_jax.coding import Codebook, EncodedRows, decode, encode
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.quantization.grids import TernaryGrid, UniformGrid

Codebooks = Mapping[str, Codebook]
"""By name."""

Parts = Mapping[str, np.ndarray]
"""What a packed matrix is stored as: see `PackedExpertMatrix`."""

LevelDtype = Literal["bfloat16", "float32"]

LEVEL_DTYPES: Mapping[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

PARTS = ("levels", "scales", "zeros", "input_scale", "column_group", "counts", "codes")
"""Everything that a matrix may be stored as; a reader refuses a part of another name."""


class Kind(Protocol):
    """How a matrix [out, in] is packed: a frozen dataclass. Levels belong to a row, or to a group of its columns.

    Attributes:
      name: what the manifest calls it.
      group_size: columns that share their levels; None: the whole row does.
      level_dtype: what levels are rounded to. bfloat16 is what upstream's models have.
      input_scaled: whether there is a scale for each input column, to be applied to x.
    """

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def group_size(self) -> int | None: ...  # noqa: D102
    @property
    def level_dtype(self) -> LevelDtype: ...  # noqa: D102
    @property
    def input_scaled(self) -> bool: ...  # noqa: D102

    def pack(
        self,
        digits: UInt8[np.ndarray, "out in"],
        levels: Float[np.ndarray, "out group 2"],
        codebooks: Codebooks,
    ) -> dict[str, np.ndarray]:
        """Digits and levels as parts."""
        ...

    def digits(
        self, parts: Parts, shape: tuple[int, int], codebooks: Codebooks
    ) -> UInt8[np.ndarray, "out in"]:
        """The digits again. Raises `coding.CorruptStream` or `ValueError` where they cannot be."""
        ...

    def values(
        self, parts: Parts, digits: UInt8[np.ndarray, "out in"], group: Int[np.ndarray, "in"]
    ) -> Float32[np.ndarray, "out in"]:
        """What the digits stand for, given the group of each column."""
        ...


@dataclasses.dataclass(frozen=True)
class Ternary:
    """Digits 0, 1, 2 for zero, minimum, maximum, written row after row as codewords of a codebook."""

    name: ClassVar[str] = "ternary"
    codebook: str
    group_size: int | None = None
    level_dtype: LevelDtype = "bfloat16"
    input_scaled: bool = False

    def pack(
        self,
        digits: UInt8[np.ndarray, "out in"],
        levels: Float[np.ndarray, "out group 2"],
        codebooks: Codebooks,
    ) -> dict[str, np.ndarray]:
        """Parts `levels`, `counts`, `codes`."""
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
        """Decodes every row to exactly `in` digits, else raises `coding.CorruptStream`."""
        return np.asarray(decode(self.encoded(parts), self._codebook(codebooks), shape[1]))

    def values(
        self, parts: Parts, digits: UInt8[np.ndarray, "out in"], group: Int[np.ndarray, "in"]
    ) -> Float32[np.ndarray, "out in"]:
        """Return zero or the minimum or maximum of the group, in float32."""
        levels = parts["levels"].astype(np.float32).reshape(len(digits), -1, 2)
        if levels.shape[1] > 1:
            levels = levels[:, group]
        return TernaryGrid().value(digits, (levels[..., 0], levels[..., 1]))

    def encoded(self, parts: Parts) -> EncodedRows:
        """The stream that `coding` reads: codes, and where rows begin among them."""
        counts = parts["counts"]
        offsets = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        return EncodedRows(parts["codes"], offsets)

    def _codebook(self, codebooks: Codebooks) -> Codebook:
        if self.codebook not in codebooks:
            raise ValueError(f"no codebook {self.codebook!r}, only {sorted(codebooks)}")
        return codebooks[self.codebook]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """k-bit digits, bit-packed along each row; a digit stands for (digit - zero) * scale."""

    name: ClassVar[str] = "uniform"
    bits: int
    group_size: int | None = None
    level_dtype: LevelDtype = "bfloat16"
    input_scaled: bool = False

    def pack(
        self,
        digits: UInt8[np.ndarray, "out in"],
        levels: Float[np.ndarray, "out group 2"],
        codebooks: Codebooks,
    ) -> dict[str, np.ndarray]:
        """Parts `scales`, `zeros`, `codes`. Raises `ValueError` where a zero point is no integer."""
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
        """Unpacks every row; raises `ValueError` where the bytes are not as many as the shape says."""
        out, width = shape
        codes, expected = parts["codes"], out * packed_bytes(width, self.bits)
        if codes.size != expected:
            raise ValueError(f"expected {expected} bytes of digits, found {codes.size}")
        return unpack_bits(codes.reshape(out, -1), self.bits, width)

    def values(
        self, parts: Parts, digits: UInt8[np.ndarray, "out in"], group: Int[np.ndarray, "in"]
    ) -> Float32[np.ndarray, "out in"]:
        """(digit - zero) * scale, in float32."""
        scales = parts["scales"].astype(np.float32).reshape(len(digits), -1)
        zeros = parts["zeros"].astype(np.float32).reshape(len(digits), -1)
        if scales.shape[1] > 1:
            scales, zeros = scales[:, group], zeros[:, group]
        return UniformGrid(self.bits).value(digits, (scales, zeros))


KINDS: Mapping[str, type[Ternary] | type[Uniform]] = {kind.name: kind for kind in (Ternary, Uniform)}


def kind_to_json(kind: Kind) -> dict[str, Any]:
    """A kind as the manifest has it."""
    return {"name": kind.name, **dataclasses.asdict(kind)}


def kind_from_json(fields: Mapping[str, Any], path: object) -> Kind:
    """The kind that a manifest or a group file names; `path` is for the error.

    Raises:
      CheckpointError: the name or one of the options is unknown to this version.
    """
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
    if options.keys() != known or options["level_dtype"] not in LEVEL_DTYPES:
        raise CheckpointError(
            "unknown options of packing",
            path=path,
            key=name,
            expected=f"{sorted(known)}, level_dtype one of {sorted(LEVEL_DTYPES)}",
            found=dict(options),
            remedy=remedy,
        )
    return KINDS[name](**options)


def num_groups(kind: Kind, width: int) -> int:
    """How many groups a row of `width` columns has."""
    return 1 if kind.group_size is None else -(-width // kind.group_size)
