"""Kernels that multiply by ternary matrices while they decode them: arrays in, arrays out."""

from pallas_kernels.decode import unpack as unpack
from pallas_kernels.matmul import packed_matmul as packed_matmul
from pallas_kernels.matvec import packed_matvec as packed_matvec
from pallas_kernels.mlp import packed_mlp as packed_mlp
from pallas_kernels.operands import DecodeTable as DecodeTable
from pallas_kernels.operands import PackedMatrix as PackedMatrix
