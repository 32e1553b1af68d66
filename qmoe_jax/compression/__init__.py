"""Calibration and quantization of a whole model, streamed and resumable."""

from qmoe_jax.compression.options import CompressionConfig as CompressionConfig
from qmoe_jax.compression.pipeline import compress as compress
from qmoe_jax.compression.report import CompressionReport as CompressionReport
from qmoe_jax.inference.blockwise.progress import ProgressBar as ProgressBar
