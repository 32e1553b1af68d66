"""T5X checkpoints: its own format (msgpack and zarr), and those that T5X writes through Orbax."""

from qmoe_jax.checkpoints.t5x.reader import open_t5x as open_t5x
from qmoe_jax.checkpoints.t5x.writer import write_parameters as write_parameters
from qmoe_jax.checkpoints.t5x.writer import write_t5x as write_t5x
