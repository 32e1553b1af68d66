"""A short measurement of this machine: the rates that a plan divides its work by."""

from __future__ import annotations

import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.checkpoints.params import nest
from qmoe_jax.coding import encode, tunstall_codebook
from qmoe_jax.compression.planning.rates import Rates
from qmoe_jax.compression.threads import blas_on_one_thread
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.errors import system_error
from qmoe_jax.files.space import allocate
from qmoe_jax.models.switch import EncoderBlock
from qmoe_jax.quantization import (
    add_tokens,
    empty_hessians,
    factorize,
    gptq_with_factor,
    ternary_grid,
)
from qmoe_jax.settings import own_settings

WIDEST = 2048
"""Columns of the matrices measured, at most: rates hardly change beyond, and a second is enough."""

DISK_BYTES = 1 << 27
"""Bytes that are written and read again to measure a disk (128 MiB)."""

TOKENS = 1024
"""Tokens of the products measured: two rows of 512 in attention."""


@own_settings(matmul_precision=True)
def measure_rates(model: SwitchConfig, folder: Path) -> Rates:
    """Measure this machine at a model's widths, in a few seconds on two idle cores, most of it compilation.

    Memory: about 200 MB on the device for c-2048. Disk: `DISK_BYTES`, in a file without a name.

    Args:
        model: the architecture.
        folder: an existing folder on the disk to measure.

    Raises:
        CheckpointError: the disk refuses.
    """
    device = jax.devices()[0]
    cores = os.cpu_count() or 1
    read, write = _disk(folder)
    with blas_on_one_thread():
        return Rates(
            name=f"this machine: {device.device_kind}, {cores} cores",
            product=_product(model),
            **_quantization(model),
            attention=_attention(model),
            encode=_encode(),
            inflate=cores * _inflate(),
            read=read,
            write=write,
            shares_cores=device.platform == "cpu",
            source="measured",
        )


def _seconds(run: Callable[[], Any], repeats: int = 2) -> float:
    """Return the least time of a function that returns arrays, not counting the first call."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def _product(model: SwitchConfig) -> float:
    """Return the flop/s of a product of hidden states and an expert's input matrix."""
    x, w = _normal(TOKENS, model.d_model), _normal(model.d_model, min(model.d_ff, WIDEST))
    return 2.0 * x.shape[0] * w.size / _seconds(lambda: x @ w)


def _quantization(model: SwitchConfig) -> dict[str, float]:
    """Return the flop/s of Hessians, factorizations and GPTQ."""
    wide, rows = min(model.d_ff, WIDEST), min(model.d_model, 512)
    x, none = _normal(TOKENS, wide), jnp.zeros(TOKENS, jnp.int32)
    hessian = add_tokens(empty_hessians(1, wide), x, none).sums
    factor = factorize(hessian)
    w = _normal(1, rows, wide)
    times: dict[str, tuple[float, Callable[[], Any]]] = {
        "hessian": (2.0 * TOKENS * wide * wide, lambda: add_tokens(empty_hessians(1, wide), x, none).sums),
        "cholesky": (float(wide) ** 3 / 3, lambda: factorize(hessian).lower),
        "gptq": (float(wide) ** 2 * rows, lambda: gptq_with_factor(w, factor, ternary_grid()).digits),
    }
    return {name: flops / _seconds(run, 1) for name, (flops, run) in times.items()}


def _attention(model: SwitchConfig) -> float:
    """Return the flop/s of a layer's self-attention."""
    block, length = EncoderBlock(model, False), TOKENS // 2
    x = _normal(2, length, model.d_model)
    width = model.num_heads * model.d_kv
    names = ("query", "key", "value")
    shapes: dict[str, tuple[int, ...]] = {
        f"attention/{name}/kernel": (model.d_model, width) for name in names
    }
    shapes |= {"attention/out/kernel": (width, model.d_model)}
    shapes |= {"pre_attention_layer_norm/scale": (model.d_model,)}
    params = nest({name: 0.02 * _normal(*shape) for name, shape in shapes.items()})
    bias = jnp.zeros((1, model.num_heads, length, length), jnp.float32)
    attend = jax.jit(lambda params, x: block.apply({"params": params}, x, bias, method="attend"))
    flops = TOKENS * (8.0 * model.d_model * width + 4.0 * length * width)
    return flops / _seconds(lambda: attend(params, x))


def _encode() -> float:
    """Return the ternary digits that become codewords per second."""
    digits = np.random.default_rng(0).choice(3, (512, 2048), p=[0.9, 0.05, 0.05]).astype(np.uint8)
    codebook = tunstall_codebook()
    return digits.size / _seconds(lambda: encode(digits, codebook).codes)


def _inflate() -> float:
    """Return the bytes per second that one core inflates of float32 weights."""
    content = np.random.default_rng(0).standard_normal(1 << 20, np.float32).tobytes()
    packed = zlib.compress(content, 1)
    return len(content) / _seconds(lambda: zlib.decompress(packed) and ())


def _disk(folder: Path) -> tuple[float, float]:
    """Return the bytes per second that are read from and written to the disk of a folder, in order."""
    content = np.random.default_rng(0).bytes(1 << 24)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            allocate(file.fileno(), DISK_BYTES)
            began = time.perf_counter()
            for start in range(0, DISK_BYTES, len(content)):
                os.pwrite(file.fileno(), content, start)
            os.fsync(file.fileno())
            written = time.perf_counter() - began
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            for start in range(0, DISK_BYTES, len(content)):
                os.pread(file.fileno(), len(content), start)
            return DISK_BYTES / (time.perf_counter() - began), DISK_BYTES / written
    except OSError as error:
        raise system_error("the disk cannot be measured", folder, error) from error
