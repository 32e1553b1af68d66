"""Ternary digits as codewords: the codebooks, and the streams written with them."""

from qmoe_jax.coding.codebook import Codebook as Codebook
from qmoe_jax.coding.statistics import digit_frequencies as digit_frequencies
from qmoe_jax.coding.statistics import entropy_bits as entropy_bits
from qmoe_jax.coding.statistics import fitted_p_zero as fitted_p_zero
from qmoe_jax.coding.stream import CorruptStream as CorruptStream
from qmoe_jax.coding.stream import Encoded as Encoded
from qmoe_jax.coding.stream import decode as decode
from qmoe_jax.coding.stream import encode as encode
from qmoe_jax.coding.stream import pack as pack
from qmoe_jax.coding.tunstall import tunstall_codebook as tunstall_codebook
from qmoe_jax.coding.upstream import upstream_codebook as upstream_codebook
