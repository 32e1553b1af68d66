"""Switch Transformers below one bit per parameter, in JAX (QMoE, arXiv 2310.16795)."""

from qmoe_jax.config import PRESETS as PRESETS
from qmoe_jax.config import SwitchConfig as SwitchConfig
