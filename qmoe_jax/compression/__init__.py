"""Calibration and quantization of a whole model, streamed and resumable."""

from qmoe_jax.artifact.report import CompressionReport as CompressionReport
from qmoe_jax.compression.compress import compress as compress
from qmoe_jax.compression.options import CompressionConfig as CompressionConfig
