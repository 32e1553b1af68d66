"""Hugging Face directories: config.json beside safetensors or torch files, sharded or not."""

from qmoe_jax.checkpoints.huggingface.reader import open_huggingface as open_huggingface
from qmoe_jax.checkpoints.huggingface.writer import write_huggingface as write_huggingface
