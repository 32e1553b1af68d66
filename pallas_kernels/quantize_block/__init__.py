"""The inner loop of GPTQ: a block of columns, rounded in turn."""

from pallas_kernels.quantize_block.op import quantize_block as quantize_block
from pallas_kernels.quantize_block.operands import RoundedBlock as RoundedBlock
from pallas_kernels.quantize_block.rounding import CostRounding as CostRounding
from pallas_kernels.quantize_block.rounding import Rounding as Rounding
from pallas_kernels.quantize_block.rounding import TernaryRounding as TernaryRounding
from pallas_kernels.quantize_block.rounding import UniformRounding as UniformRounding
