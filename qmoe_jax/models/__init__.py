"""The Switch Transformer in linen."""

from qmoe_jax.models.router import CapacityRule as CapacityRule
from qmoe_jax.models.router import GroupCapacity as GroupCapacity
from qmoe_jax.models.router import SequenceCapacity as SequenceCapacity
from qmoe_jax.models.switch import SwitchTransformer as SwitchTransformer
