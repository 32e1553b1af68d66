"""Switch Transformers below one bit per parameter, in JAX (QMoE, arXiv 2310.16795)."""

from qmoe_jax.artifact.open import open_checkpoint as open_checkpoint
from qmoe_jax.artifact.verify import Verification as Verification
from qmoe_jax.artifact.verify import verify as verify
from qmoe_jax.checkpoints.convert import convert as convert
from qmoe_jax.checkpoints.inspect import inspect as inspect
from qmoe_jax.compression import CompressionConfig as CompressionConfig
from qmoe_jax.compression import CompressionReport as CompressionReport
from qmoe_jax.compression import compress as compress
from qmoe_jax.config import PRESETS as PRESETS
from qmoe_jax.config import SwitchConfig as SwitchConfig
from qmoe_jax.evaluation import Comparison as Comparison
from qmoe_jax.evaluation import Evaluation as Evaluation
from qmoe_jax.evaluation import compare as compare
from qmoe_jax.evaluation import evaluate as evaluate
from qmoe_jax.files.errors import CheckpointError as CheckpointError
from qmoe_jax.inference import Sampling as Sampling
from qmoe_jax.inference import decompress as decompress
from qmoe_jax.inference import expert_statistics as expert_statistics
from qmoe_jax.inference import generate as generate
from qmoe_jax.inference import load_compressed as load_compressed
from qmoe_jax.inference import load_model as load_model
from qmoe_jax.progress import ProgressBar as ProgressBar
