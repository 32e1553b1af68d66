"""Compressed directories of the original QMoE program: torch files with the experts as codewords."""

from qmoe_jax.checkpoints.upstream.reader import UpstreamReader as UpstreamReader
from qmoe_jax.checkpoints.upstream.reader import open_upstream as open_upstream
from qmoe_jax.checkpoints.upstream.writer import TernaryMatrix as TernaryMatrix
from qmoe_jax.checkpoints.upstream.writer import write_upstream as write_upstream
