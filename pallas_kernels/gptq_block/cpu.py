"""On a CPU: what XLA makes of the reference."""

from pallas_kernels.gptq_block import reference

gptq_block = reference.gptq_block
