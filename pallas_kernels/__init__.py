"""Kernels on ternary matrices kept as codewords, which decode while they multiply: arrays in, arrays out."""

from pallas_kernels.encode_rows import EncodedRows as EncodedRows
from pallas_kernels.encode_rows import EncodeTable as EncodeTable
from pallas_kernels.encode_rows import encode_rows as encode_rows
from pallas_kernels.matmul import packed_matmul as packed_matmul
from pallas_kernels.mlp import packed_mlp as packed_mlp
from pallas_kernels.operands import DecodeTable as DecodeTable
from pallas_kernels.operands import PackedMatrix as PackedMatrix
from pallas_kernels.quantize_block import BlockGrid as BlockGrid
from pallas_kernels.quantize_block import RoundedBlock as RoundedBlock
from pallas_kernels.quantize_block import quantize_block as quantize_block
from pallas_kernels.unpack import unpack as unpack
