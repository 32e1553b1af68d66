"""Ternary and k-bit quantization of experts: GPTQ on their Hessians, or round-to-nearest."""

from qmoe_jax.quantization.factorization import DAMPING_FLOOR as DAMPING_FLOOR
from qmoe_jax.quantization.factorization import Factor as Factor
from qmoe_jax.quantization.factorization import damping_term as damping_term
from qmoe_jax.quantization.factorization import factorize as factorize
from qmoe_jax.quantization.gptq import gptq as gptq
from qmoe_jax.quantization.gptq import gptq_with_factor as gptq_with_factor
from qmoe_jax.quantization.grids import Grid as Grid
from qmoe_jax.quantization.grids import ternary_grid as ternary_grid
from qmoe_jax.quantization.grids import uniform_grid as uniform_grid
from qmoe_jax.quantization.hessian import Hessians as Hessians
from qmoe_jax.quantization.hessian import add_tokens as add_tokens
from qmoe_jax.quantization.hessian import empty_hessians as empty_hessians
from qmoe_jax.quantization.nearest import round_to_nearest as round_to_nearest
from qmoe_jax.quantization.quantized import Quantized as Quantized
from qmoe_jax.quantization.rate_distortion import rate_distortion_grid as rate_distortion_grid
from qmoe_jax.quantization.relative_error import relative_error as relative_error
