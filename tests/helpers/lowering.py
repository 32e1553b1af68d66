"""Programs lowered for a GPU that is not present."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh

TRITON_CALL = "__gpu$xla.gpu.triton"
H100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")


def for_an_h100():
    """Return a context in which programs are traced for an H100."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100))


def lowered_for_cuda(function, *args) -> str:
    """Return the program that XLA for a GPU would be given."""
    with for_an_h100():
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


def kernels(program: str) -> int:
    """Return the number of calls of Triton kernels."""
    return program.count(f"stablehlo.custom_call @{TRITON_CALL}")
