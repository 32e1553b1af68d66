"""Measures tokens per second on a GPU: packed experts against bfloat16, and as many layers of c-2048 as fit.

    python -m benchmarks.end_to_end_gpu             # on the device
    python -m benchmarks.end_to_end_gpu --rehearse  # anywhere: tiny models, which checks the script

Takes some minutes (not measured yet) and prints one JSON object per model. Weights are random. Packed experts
are random valid codewords of the byte codebook, with the frequencies of digits with P(0) = .885, made on the
device layer by layer: `--distinct` experts per layer, repeated, each copy in memory of its own. Where the
experts in bfloat16 do not fit, all tokens share one expert: the same arithmetic and as many bytes read, but
fewer bytes in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu
from benchmarks.samples import P_ZERO, codeword_probabilities
from pallas_kernels import PackedMatrix
from qmoe_jax.coding import tunstall_codebook
from qmoe_jax.config import PRESETS, SwitchConfig
from qmoe_jax.inference.generate import generate
from qmoe_jax.models import SwitchTransformer

NEW_TOKENS, PROMPT = 128, 64
OTHER_BYTES = 4 << 30  # for dense parameters, activations and the arrays needed while a layer is made
BITS_PER_WEIGHT = 0.705  # of the random codewords, with the padding of their rows
ALIGNMENT = 128  # of an expert's codes, in bytes: even, as codes of 2 to 4 GiB must be


@functools.partial(jax.jit, static_argnames=("rows", "width", "distinct"))
def random_streams(key: Any, rows: int, width: int, distinct: int) -> tuple[Any, Any]:
    """Return (codes, row offsets) of experts whose rows end with the codeword that reaches the width."""
    book = tunstall_codebook(P_ZERO)
    probability = codeword_probabilities(book)
    edges = jnp.asarray(np.cumsum(probability) / probability.sum(), jnp.float32)
    mean = float((probability * book.lengths).sum() / probability.sum())
    most = int(width / mean + 12 * (width / mean) ** 0.5) + 16

    def expert(key: Any) -> tuple[Any, Any]:
        drawn = jax.random.uniform(key, (rows, most))
        code = jnp.minimum(jnp.searchsorted(edges, drawn, side="right"), book.size - 1)
        reached = jnp.cumsum(jnp.asarray(book.lengths)[code], axis=1)
        count = jnp.sum(reached < width, axis=1) + 1
        offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)])
        at = offsets[:-1, None] + jnp.arange(most)
        at = jnp.where(jnp.arange(most) < count[:, None], at, rows * most)
        return jnp.zeros(rows * most, jnp.uint8).at[at].set(code.astype(jnp.uint8), mode="drop"), offsets

    return jax.lax.map(expert, jax.random.split(key, distinct))


def random_packed(key: Any, experts: int, rows: int, width: int, distinct: int) -> PackedMatrix:
    """Draw the matrices of one layer's experts."""
    distinct = min(distinct, experts)
    codes, offsets = random_streams(key, rows, width, distinct)
    capacity = -(-int(offsets[:, -1].max()) // ALIGNMENT) * ALIGNMENT
    repeat = jax.jit(lambda array: jnp.tile(array, (experts // distinct, 1)))
    codes, offsets = repeat(codes[:, :capacity]), repeat(offsets)
    levels = jnp.broadcast_to(jnp.asarray([-1.0, 1.0], jnp.bfloat16) * 2.5 * width**-0.5, (experts, rows, 2))
    table = jax.device_put(tunstall_codebook(P_ZERO).decode_table)
    return PackedMatrix(codes, offsets, levels + 0, table, width)


def random_params(config: SwitchConfig, experts: str, distinct: int) -> tuple[SwitchTransformer, Any]:
    """Draw a model with bfloat16 parameters and "packed" or "dense" experts on the device."""
    from flax import linen as nn

    model = SwitchTransformer(config, None, jnp.bfloat16)
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"])
    number = iter(range(1 << 20))

    def leaf(path: Any, shape: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(1), next(number))
        names = [entry.key for entry in path]
        if "expert" in names and experts == "packed":
            count, width, rows = shape.shape
            return jax.block_until_ready(random_packed(key, count, rows, width, distinct))
        if len(shape.shape) == 1:
            return jnp.ones(shape.shape, jnp.bfloat16)
        scale = shape.shape[-2] ** -0.5
        return jax.random.normal(key, shape.shape, jnp.bfloat16) * jnp.bfloat16(scale)

    return model, jax.tree_util.tree_map_with_path(leaf, shapes)


def tokens_per_second(model: SwitchTransformer, params: Any, new_tokens: int) -> float:
    """Return the tokens per second of one row, compilation excluded, for a model that never ends a text."""
    prompt = jnp.asarray(
        np.random.default_rng(0).integers(3, model.config.vocab_size, (1, PROMPT)), jnp.int32
    )
    run = lambda: generate(model, params, prompt, max_new_tokens=new_tokens)
    first = np.asarray(run())
    if not (first >= 0).all():
        raise AssertionError("expected ids of at least 0 from generation, found negative ones")
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        np.asarray(run())
        best = min(best, time.perf_counter() - start)
    return new_tokens / best


def measured(config: SwitchConfig, experts: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make one model, measure it and return its row of the result."""
    start = time.perf_counter()
    model, params = random_params(config, experts, options.distinct)
    made = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rate = tokens_per_second(model, params, options.new_tokens)
    stats = jax.devices()[0].memory_stats() or {}
    row = {
        "experts": experts,
        "layers": [config.num_encoder_layers, config.num_decoder_layers],
        "experts_per_layer": config.num_experts,
        "parameter_gigabytes": round(size / 1e9, 2),
        "peak_gigabytes": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2),
        "seconds_to_make": round(made, 1),
        "tokens_per_second": round(rate, 2),
    }
    print(json.dumps(row), flush=True)
    return row


def endless(config: SwitchConfig, **changes: Any) -> SwitchConfig:
    """Return the configuration without an end token, so that every generation has the requested length."""
    return dataclasses.replace(config, eos_id=-1, **changes)


def layers_that_fit(config: SwitchConfig) -> int:
    """Return how many layers of each stack have packed experts that fit the device's memory."""
    stats = jax.devices()[0].memory_stats()
    if not stats:
        return config.num_encoder_layers
    free = stats["bytes_limit"] - stats["bytes_in_use"] - OTHER_BYTES
    rows = config.d_model + config.d_ff
    row_bytes = 8  # an offset and two levels
    expert = 2 * config.d_model * config.d_ff * BITS_PER_WEIGHT / 8 + rows * row_bytes
    return min(config.num_encoder_layers, int(free / (2 * config.num_experts * expert)))


def shortened(config: SwitchConfig, layers: int) -> SwitchConfig:
    """Return the configuration with its first `layers` layers only, all of them sparse as in c-2048."""
    sparse = tuple(range(layers))
    return endless(
        config,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        encoder_sparse_layers=sparse,
        decoder_sparse_layers=sparse,
    )


def c2048(options: argparse.Namespace, config: SwitchConfig) -> dict[str, Any]:
    """Measure as many layers as fit with all experts, then with one bfloat16 expert for all tokens."""
    for layers in range(layers_that_fit(config), 0, -1):
        resident = (
            f"{2 * layers} of {2 * config.num_encoder_layers} layers x {config.num_experts} experts resident"
        )
        print(f"c-2048: {resident}", flush=True)
        fitting = shortened(config, layers)
        try:
            packed = measured(fitting, "packed", options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{resident}: out of memory, one layer of each stack less", flush=True)
            continue
        shared = measured(dataclasses.replace(fitting, num_experts=1), "dense", options)
        whole = layers == config.num_encoder_layers
        return {
            "resident": resident,
            "whole_model": whole,
            "packed": packed,
            "dense, one expert for all": shared,
        }
    raise SystemExit("c-2048: one layer of each stack does not fit this device's memory")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["switch-base-128", "switch-c-2048"])
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument(
        "--distinct", type=int, default=32, help="different experts per layer; a power of two"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny models, nothing measured")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.98")  # read when jax first sees the device
    gpu.require_gpu(options.rehearse)
    presets = PRESETS
    if options.rehearse:
        tiny = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_experts": 4, "vocab_size": 64}
        presets = {name: dataclasses.replace(PRESETS[name], **tiny) for name in options.models}
        presets = {name: shortened(config, 2) for name, config in presets.items()}
        options.new_tokens, options.distinct = 4, 2
    result = gpu.device() | {"new_tokens": options.new_tokens, "prompt_tokens": PROMPT}
    for name in options.models:
        config = presets[name]
        if name == "switch-c-2048":
            result[name] = c2048(options, config)
        else:
            result[name] = {kind: measured(endless(config), kind, options) for kind in ("packed", "dense")}
    if options.rehearse:
        print(
            "rehearsed: both kinds of experts generate; "
            "the figures above are of tiny models and are not stored"
        )
        return
    gpu.result_path("end-to-end", options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
