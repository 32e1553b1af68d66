"""Switch Transformer checkpoints: one class to read them all by, and the formats to write."""

from qmoe_jax.checkpoints.open import FORMATS as FORMATS
from qmoe_jax.checkpoints.open import open_dense as open_dense
from qmoe_jax.checkpoints.reader import Checkpoint as Checkpoint
from qmoe_jax.checkpoints.t5x import write_t5x as write_t5x
from qmoe_jax.files.errors import CheckpointError as CheckpointError
