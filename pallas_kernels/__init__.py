"""Kernels that multiply by ternary matrices while they decode them: arrays in, arrays out."""

from pallas_kernels.operands import DecodeTable as DecodeTable
from pallas_kernels.operands import PackedMatrix as PackedMatrix
