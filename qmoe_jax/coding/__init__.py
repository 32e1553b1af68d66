"""Codebooks for ternary digits, and the streams of codewords written with them."""

from pallas_kernels.encode_rows import EncodedRows as EncodedRows
from qmoe_jax.coding.codebook import Codebook as Codebook
from qmoe_jax.coding.statistics import entropy_bits as entropy_bits
from qmoe_jax.coding.stream import CorruptStream as CorruptStream
from qmoe_jax.coding.stream import decode as decode
from qmoe_jax.coding.stream import encode as encode
from qmoe_jax.coding.stream import pack as pack
from qmoe_jax.coding.tunstall import tunstall_codebook as tunstall_codebook
from qmoe_jax.coding.upstream import upstream_codebook as upstream_codebook
