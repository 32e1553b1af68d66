"""Calibration and quantization of a whole model, streamed and resumable."""

from qmoe_jax.artifact.report import CompressionReport as CompressionReport
from qmoe_jax.compression.compress import compress as compress
from qmoe_jax.compression.options import CompressionConfig as CompressionConfig
from qmoe_jax.compression.planning.costs import TokenCounts as TokenCounts
from qmoe_jax.compression.planning.plan import CompressionPlan as CompressionPlan
from qmoe_jax.compression.planning.plan import plan as plan
