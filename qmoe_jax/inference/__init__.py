"""Models from checkpoints and artifacts, and generation with them."""

from qmoe_jax.inference.fill import FilledText as FilledText
from qmoe_jax.inference.fill import fill_blanks as fill_blanks
from qmoe_jax.inference.generate import generate as generate
from qmoe_jax.inference.load import load_compressed as load_compressed
from qmoe_jax.inference.load import load_model as load_model
from qmoe_jax.inference.placement import expert_statistics as expert_statistics
from qmoe_jax.inference.sampling import Sampling as Sampling
from qmoe_jax.inference.tokenizer import load_tokenizer as load_tokenizer
