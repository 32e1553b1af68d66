"""XLA's compiler for NVIDIA GPUs, run where there is none.

Needs only the wheels `jax-cuda13-plugin` and `jax-cuda13-pjrt` of jax's own version, without what they depend on;
the Makefile puts them into a folder of the environment that jax on the CPU never looks into (`plugin_folder`).
Whoever imports jax here must have that folder on the path and JAX_PLATFORMS=cpu (`environment`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import cubin
import riegeli

PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler asks of a device; the figures are NVIDIA's.

    Attributes:
      capability: compute capability: 90 for 9.0.
      cores: multiprocessors.
      shared_bytes: shared memory that a block may ask for; of `core_shared_bytes`.
    """

    kind: str
    capability: int
    cores: int
    lanes_per_core: int
    shared_bytes: int
    core_shared_bytes: int
    memory_bytes: int
    l2_bytes: int
    bytes_per_second: int
    gigahertz: float

    @property
    def description(self) -> str:
        """As the text of XLA's message `GpuTargetConfigProto`."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_bytes}
              shared_memory_per_core: {self.core_shared_bytes}
              core_count: {self.cores} fpus_per_core: {self.lanes_per_core} clock_rate_ghz: {self.gigahertz}
              memory_bandwidth: {self.bytes_per_second} l2_cache_size: {self.l2_bytes}
              device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {self.capability // 10} minor: {self.capability % 10} }}
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{self.kind}"
        """


GPUS = {
    "sm_90": Gpu(
        "NVIDIA H100 80GB HBM3", 90, 132, 128, 232448, 233472, 84978434048, 50 << 20, 3352 * 10**9, 1.98
    ),
    "sm_80": Gpu(
        "NVIDIA A100-SXM4-40GB", 80, 108, 64, 166912, 167936, 42331013120, 40 << 20, 1555 * 10**9, 1.41
    ),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, with how XLA starts it: so many threads a program, and bytes of shared memory beside its own.

    None where it does not say: jax-triton's calls start their kernels themselves.
    """

    kernel: cubin.Kernel
    threads: int | None
    shared_bytes: int | None


def plugin_folder() -> pathlib.Path:
    """Where the Makefile puts the plugin of this environment."""
    return pathlib.Path(sys.prefix, "cuda-plugin")


def refusal() -> str | None:
    """Why nothing can be compiled here, or None."""
    import jax

    path = [str(plugin_folder()), *sys.path]
    for package in PACKAGES:
        found = [d.version for d in importlib.metadata.distributions(name=package, path=path)]
        if not found:
            return f"{package} is not in {plugin_folder()}, where `make test` puts it if it can be downloaded"
        if found[0] != jax.__version__:
            return f"{package} {found[0]} is for another jax than {jax.__version__}: remove {plugin_folder()}"
    return None


def environment() -> dict[str, str]:
    """Variables for a process that compiles."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "TRITON_INTERPRET")}
    root = str(pathlib.Path(__file__).parent.parent)
    return {**kept, "PYTHONPATH": os.pathsep.join([root, str(plugin_folder())]), "JAX_PLATFORMS": "cpu"}


def absent(gpu: Gpu) -> Any:
    """Inside it jax lowers for `gpu`, and every op takes its kernels for it."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind=gpu.kind, num_cores=gpu.cores, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@functools.cache
def _device(gpu: Gpu) -> Any:
    from jax.experimental import topologies

    described = {"target_config": gpu.description, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name="", **described).devices[0]


def launches(function: Callable[..., Any], shapes: tuple[Any, ...], gpu: Gpu) -> list[Launch]:
    """The kernels of `function` on arrays of these shapes, compiled for `gpu`.

    Raises:
      jax.errors.JaxRuntimeError: it does not compile, for want of shared memory for one.
    """
    import jax
    from jax.sharding import SingleDeviceSharding

    sharding = SingleDeviceSharding(_device(gpu))
    arguments = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
    with absent(gpu):
        lowered = jax.jit(function).trace(*arguments).lower()
    with tempfile.TemporaryDirectory() as folder:
        # Autotuning would run candidates on the device.
        compiled = lowered.compile(compiler_options={"xla_gpu_autotune_level": "0", "xla_dump_to": folder})
        started = _started(pathlib.Path(folder))
    program = compiled.runtime_executable().serialize()
    kernels = [kernel for leaf in riegeli.leaves(program) for kernel in cubin.kernels(leaf, gpu.capability)]
    return [Launch(kernel, *started.get(kernel.name, (None, None))) for kernel in kernels]


def _started(dump: pathlib.Path) -> dict[str, tuple[int, int]]:
    """(threads, bytes of shared memory) of each kernel by XLA's list of what the program does."""
    started = {}
    for path in dump.glob("*.thunk_sequence.txt"):
        for name, threads, shared in re.findall(
            r"(\S+) grid: \[[\d, ]+\] threads: \[(\d+), 1, 1\] +shared_memory: (\d+) bytes", path.read_text()
        ):
            started[name] = int(threads), int(shared)
    return started
