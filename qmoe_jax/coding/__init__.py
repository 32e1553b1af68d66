"""Ternary digits as codewords: the codebooks, and the streams written with them."""

from qmoe_jax.coding.codebook import Codebook as Codebook
