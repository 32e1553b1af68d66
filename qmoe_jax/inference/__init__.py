"""Models from checkpoints and artifacts, and generation with them."""

from qmoe_jax.inference.decompress import decompress as decompress
from qmoe_jax.inference.generate import generate as generate
from qmoe_jax.inference.load import load_compressed as load_compressed
from qmoe_jax.inference.load import load_model as load_model
from qmoe_jax.inference.placement import expert_statistics as expert_statistics
from qmoe_jax.inference.sampling import Sampling as Sampling
