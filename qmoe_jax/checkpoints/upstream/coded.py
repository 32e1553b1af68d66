"""Expert kernels as codewords of upstream QMoE: decoded as they are read, or packed as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16

from pallas_kernels import PackedMatrix
from qmoe_jax.coding import EncodedRows, decode, pack, upstream_codebook
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.finite import require_finite
from qmoe_jax.files.tensor import read_all
from qmoe_jax.files.torch_pickle import TorchTensor
from qmoe_jax.quantization import ternary_grid


@dataclasses.dataclass(frozen=True, slots=True)
class CodedMatrix:
    """One expert's matrix [out, in] as it is stored.

    Attributes:
        codes: codewords of all rows, uint16 under the name of int16.
        offsets: where each row begins in `codes`, int32 [out + 1].
        levels: minimum and maximum of each row in turn, bfloat16 [2 out].
    """

    codes: TorchTensor
    offsets: TorchTensor
    levels: TorchTensor

    @property
    def rows(self) -> int:
        """The number of output features."""
        return self.offsets.shape[0] - 1

    def read(self) -> tuple[EncodedRows, BFloat16[np.ndarray, "out 2"]]:
        """Return the codewords, and the minimum and maximum of each row, finite (else `CheckpointError`)."""
        encoded = EncodedRows(read_all(self.codes).view(np.uint16), read_all(self.offsets))
        levels = read_all(self.levels).reshape(-1, 2)
        require_finite(levels, path=self.levels.storage.file, key=self.levels.key)
        return encoded, levels


@dataclasses.dataclass(frozen=True)
class CodedKernel:
    """A layer's experts as a dense bfloat16 tensor [expert, in, out] that is decoded as it is read.

    Attributes:
        experts: the matrices, one per expert.
        width: number of input features.
    """

    experts: Sequence[CodedMatrix]
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [expert, in, out]."""
        return (len(self.experts), self.width, self.experts[0].rows)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the levels, bfloat16."""
        return np.dtype(ml_dtypes.bfloat16)

    def read(self, rows: slice) -> np.ndarray:
        """Return a range of experts, dequantized. Raises `CheckpointError` where codewords are damaged."""
        experts = self.experts[rows]
        array = np.empty((len(experts), *self.shape[1:]), self.dtype)
        for values, expert in zip(array, experts, strict=True):
            values[:] = self._decode(expert).T
        return array

    def pack(self, rows: slice) -> PackedMatrix:
        """Return a range of experts, codewords and levels, for kernels that decode as they multiply.

        Raises `CheckpointError` where codewords are damaged: the kernels would multiply by anything.
        """
        experts = self.experts[rows]
        streams, levels = zip(*(expert.read() for expert in experts), strict=True)
        packed = pack(streams, np.stack(levels), upstream_codebook(), self.width)
        for i, expert in enumerate(experts):
            try:
                packed.validate_expert(i)
            except ValueError as error:
                raise _damaged(expert, error) from error
        return packed

    def _decode(self, expert: CodedMatrix) -> BFloat16[np.ndarray, "out in"]:
        encoded, levels = expert.read()
        try:
            digits = decode(encoded, upstream_codebook(), self.width)
        except ValueError as error:
            raise _damaged(expert, error) from error
        return np.asarray(ternary_grid().value(np.asarray(digits), (levels[:, :1], levels[:, 1:])))


def _damaged(expert: CodedMatrix, error: ValueError) -> CheckpointError:
    file, key = expert.codes.storage.file, expert.codes.key
    return CheckpointError("damaged codewords", path=file, key=key, found=error)
