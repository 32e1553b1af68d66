"""The inner loop of GPTQ: quantize a block of columns in order."""

from pallas_kernels.quantize_block.op import quantize_block as quantize_block
from pallas_kernels.quantize_block.operands import BlockGrid as BlockGrid
from pallas_kernels.quantize_block.operands import RoundedBlock as RoundedBlock
