"""XLA's compiler for NVIDIA GPUs, run on a machine without a GPU.

Two wheels are needed, `jax-cuda13-plugin` and `jax-cuda13-pjrt` of jax's own version, without their
dependencies. The Makefile installs them into a directory outside site-packages (`plugin_folder`), because jax
on the CPU would load them from there. The process that compiles must have that directory on its path and
JAX_PLATFORMS=cpu (`environment`).

The machine code of XLA's kernels is read from XLA's own cache of compiled kernels
(`xla_gpu_kernel_cache_file`), a protocol buffer that holds each cubin uncompressed; XLA's sort kernels are
not cached and therefore not reported. jax-triton leaves PTX, which the ptxas that is part of Triton compiles.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from tests.aot import cubin

PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": "0"}  # autotuning would run candidates on the device
PTX_FOLDER = "JAX_TRITON_DUMP_DIR"  # jax-triton writes the PTX of each kernel that it compiles there
LAUNCH = re.compile(r"(\S+) grid: \[[\d, ]+\] threads: \[(\d+), 1, 1\] +shared_memory: (\d+) bytes")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The properties of a device that the compiler needs; the figures are NVIDIA's.

    Attributes:
        kind: the name that the driver reports.
        capability: compute capability, 90 for 9.0.
        cores: multiprocessors.
        lanes_per_core: float32 lanes per multiprocessor.
        shared_bytes: shared memory that one block may request, out of `core_shared_bytes`.
        core_shared_bytes: shared memory per multiprocessor.
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
    def target_config(self) -> str:
        """XLA's message `GpuTargetConfigProto` as text."""
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
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
            device_description_str: "{self.kind}"
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
    """A kernel and how XLA launches it.

    Attributes:
        kernel: the compiled kernel.
        threads: threads per block; None for jax-triton's kernels, which XLA does not launch.
        shared_bytes: dynamic shared memory per block, beside the kernel's static one; None as above.
    """

    kernel: cubin.Kernel
    threads: int | None
    shared_bytes: int | None


def plugin_folder() -> pathlib.Path:
    """Return the directory into which the Makefile installs the plugin of this environment."""
    return pathlib.Path(sys.prefix, "cuda-plugin")


def refusal() -> str | None:
    """Return why nothing can be compiled here, or None if it can."""
    import jax

    path = [str(plugin_folder()), *sys.path]
    for package in PACKAGES:
        found = [d.version for d in importlib.metadata.distributions(name=package, path=path)]
        if not found:
            return f"{package} is not in {plugin_folder()}; `make test` installs it if it can be downloaded"
        if found[0] != jax.__version__:
            return (
                f"{package} is {found[0]}, expected jax's version {jax.__version__}: remove {plugin_folder()}"
            )
    return cubin.refusal()


def environment(scratch: str) -> dict[str, str]:
    """Return the environment variables of a process that compiles.

    Args:
        scratch: an existing directory for temporary files.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "TRITON_INTERPRET")}
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[2]), str(plugin_folder())])
    return {**kept, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", PTX_FOLDER: scratch}


def run_module(module: str, *arguments: str) -> str:
    """Run `python -m module` in a process that can compile, and return what it prints.

    Raises:
        RuntimeError: it fails; the message ends with its last 3,000 characters on stderr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            env=environment(scratch),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{module} exited with {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout


def absent(gpu: Gpu) -> Any:
    """Return a context in which jax lowers for `gpu`, and every op chooses its kernels for it."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind=gpu.kind, num_cores=gpu.cores, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def compile_kernels(function: Callable[..., Any], shapes: tuple[Any, ...], gpu: Gpu) -> list[Launch]:
    """Compile `function` for `gpu` and return its kernels.

    Args:
        function: what `jax.jit` takes.
        shapes: its arguments, as pytrees of `jax.ShapeDtypeStruct`.
        gpu: the device.

    Raises:
        jax.errors.JaxRuntimeError: it does not compile, for example because a kernel needs too much shared
            memory.
    """
    import jax
    from jax.sharding import SingleDeviceSharding

    sharding = SingleDeviceSharding(devices(gpu)[0])
    arguments = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
    known = _ptx_files()
    with absent(gpu):
        lowered = jax.jit(function).trace(*arguments).lower()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        cache = folder / "kernel_cache"
        options = OPTIONS | {
            "xla_dump_to": str(folder),
            "xla_gpu_kernel_cache_file": str(cache),
        }
        if jax.__version_info__ < (0, 11):  # later versions always use the cache
            options["xla_gpu_enable_llvm_module_compilation_parallelism"] = True
        lowered.compile(compiler_options=options)
        launched = _launched(folder)
        kernels = cubin.read_kernels(cache.read_bytes()) if cache.exists() else []
        for ptx in sorted(_ptx_files() - known):
            kernels += cubin.read_kernels(_assembled(ptx, folder))
    return [Launch(kernel, *launched.get(kernel.name, (None, None))) for kernel in kernels]


@functools.cache
def devices(gpu: Gpu, count: int = 1) -> list[Any]:
    """Return absent devices of one machine, to compile for."""
    from jax.experimental import topologies

    described = {"target_config": gpu.target_config, "topology": f"1x1x{count}"}
    return topologies.get_topology_desc(platform="cuda", topology_name="", **described).devices


def _launched(dump: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Return (threads per block, bytes of dynamic shared memory) of each kernel in XLA's list of thunks."""
    found = [LAUNCH.findall(path.read_text()) for path in dump.glob("*.thunk_sequence.txt")]
    return {name: (int(threads), int(shared)) for launches in found for name, threads, shared in launches}


def _ptx_files() -> set[pathlib.Path]:
    return set(pathlib.Path(os.environ[PTX_FOLDER]).glob("*/*.ptx"))


def _assembled(ptx: pathlib.Path, folder: pathlib.Path) -> bytes:
    """Return the cubin that Triton's ptxas makes of PTX, for the GPU that the PTX names."""
    import triton

    target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
    assert target, f"{ptx} names no target"
    ptxas, output = (
        pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas",
        folder / "jax_triton.cubin",
    )
    subprocess.run([ptxas, f"--gpu-name={target[1]}", ptx, f"--output-file={output}"], check=True)
    return output.read_bytes()
