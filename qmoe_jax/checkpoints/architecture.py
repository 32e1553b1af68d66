"""The architecture that a checkpoint's own tensors have: a `SwitchConfig` from names and shapes, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.parameters import EMBEDDING, LOGITS, STACKS, input_matrices, is_expert, sparse_layers

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def expected_shapes(config: SwitchConfig) -> dict[str, Shape]:
    """The parameter tree of `config`, flat: T5X's names (flaxformer's `switch_classic`) and their shapes."""
    d, inner = config.d_model, config.num_heads * config.d_kv
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, d)}
    if not config.tied:
        shapes[LOGITS] = (d, config.vocab_size)
    for stack in STACKS:
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (config.num_heads, config.relative_attention_buckets)
        shapes[f"{stack}/{stack}_norm/scale"] = (d,)
        for i in range(config.num_layers(stack)):
            layer = f"{stack}/layers_{i}"
            for attention, norm in attention_blocks(stack).items():
                shapes[f"{layer}/{norm}/scale"] = (d,)
                shapes |= {f"{layer}/{attention}/{p}/kernel": (d, inner) for p in ("query", "key", "value")}
                shapes[f"{layer}/{attention}/out/kernel"] = (inner, d)
            shapes[f"{layer}/pre_mlp_layer_norm/scale"] = (d,)
            shapes |= _feed_forward_shapes(config, f"{layer}/mlp", sparse=i in config.sparse_layers(stack))
    return shapes


def attention_blocks(stack: str) -> dict[str, str]:
    """The attention blocks of a layer of `stack`, each with the norm before it."""
    if stack == "encoder":
        return {"attention": "pre_attention_layer_norm"}
    return {
        "self_attention": "pre_self_attention_layer_norm",
        "encoder_decoder_attention": "pre_cross_attention_layer_norm",
    }


def _feed_forward_shapes(config: SwitchConfig, prefix: str, *, sparse: bool) -> dict[str, Shape]:
    d, f = config.d_model, config.d_ff
    shapes: dict[str, Shape] = {}
    experts: Shape = ()
    if sparse:
        shapes[f"{prefix}/router/router_weights/w/kernel"] = (d, config.num_experts)
        prefix, experts = f"{prefix}/expert", (config.num_experts,)
    shapes |= {f"{prefix}/{wi}/kernel": (*experts, d, f) for wi in input_matrices(config)}
    return shapes | {f"{prefix}/wo/kernel": (*experts, f, d)}


def infer_config(shapes: Shapes, path: object, **settings: object) -> SwitchConfig:
    """The configuration that `shapes` has, and a check that every tensor fits it.

    Layers, their sparse pattern, gating and the untied head are read off the names; the sizes off the shapes:
    heads off the position bias, `d_kv` off the attention's width. `settings` are the fields that no shape
    tells (activation, epsilon, token ids); the activation is T5X's, GELU where gated and else ReLU, if not
    given.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of the wrong shape, or no known architecture has
            these.
    """
    if EMBEDDING not in shapes:
        raise CheckpointError(
            "not a Switch Transformer this program knows",
            path=path,
            key=EMBEDDING,
            expected="an embedding shared by encoder and decoder",
            found=", ".join(sorted(shapes)[:3]) or "no tensors",
        )
    vocab_size, d_model = _dimensions(shapes, EMBEDDING, "vocabulary, d_model", path)
    heads, buckets = _dimensions(shapes, "encoder/relpos_bias/rel_embedding", "heads, buckets", path)
    inner = _dimensions(shapes, "encoder/layers_0/attention/query/kernel", "d_model, heads * d_kv", path)[1]
    if not heads or inner % heads:
        raise CheckpointError(
            "the attention's width is no multiple of its heads",
            path=path,
            key="encoder/layers_0/attention/query/kernel",
            expected=f"a multiple of {heads} heads (encoder/relpos_bias/rel_embedding)",
            found=inner,
        )
    layers = {stack: _layers(shapes, stack, path) for stack in STACKS}
    sparse = {stack: sparse_layers(shapes, stack) for stack in STACKS}
    gated = any(name.endswith("/wi_0/kernel") for name in shapes)
    wo = min(
        (name for name in shapes if re.search(r"/mlp/(expert/)?wo/kernel$", name)),
        default="(no mlp/wo/kernel)",
    )
    config = SwitchConfig(
        **{  # type: ignore[arg-type]
            "d_model": d_model,
            "d_ff": _dimensions(shapes, wo, "(experts,) d_ff, d_model", path, ranks=(2, 3))[-2],
            "d_kv": inner // heads,
            "num_heads": heads,
            "num_encoder_layers": layers["encoder"],
            "num_decoder_layers": layers["decoder"],
            "num_experts": _experts(shapes),
            "encoder_sparse_layers": sparse["encoder"],
            "decoder_sparse_layers": sparse["decoder"],
            "vocab_size": vocab_size,
            "activation": "gelu" if gated else "relu",
            "gated": gated,
            "tied": LOGITS not in shapes,
            "relative_attention_buckets": buckets,
            **settings,
        }
    )
    validate_shapes(shapes, config, path)
    return config


def validate_shapes(shapes: Shapes, config: SwitchConfig, path: object) -> None:
    """Raises `CheckpointError` naming the first tensor that `config` does not have, or not in this shape."""
    expected = expected_shapes(config)
    if missing := sorted(expected.keys() - shapes.keys()):
        _refuse("tensors are missing", path, missing, expected=expected[missing[0]], found="nothing")
    if unknown := sorted(shapes.keys() - expected.keys()):
        _refuse("tensors that a Switch Transformer does not have", path, unknown, found=shapes[unknown[0]])
    if wrong := sorted(name for name in expected if expected[name] != shapes[name]):
        _refuse("tensors of another shape", path, wrong, expected=expected[wrong[0]], found=shapes[wrong[0]])


def _refuse(
    problem: str, path: object, names: list[str], expected: object = None, found: object = None
) -> None:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    raise CheckpointError(problem, path=path, key=names[0] + more, expected=expected, found=found)


def _dimensions(
    shapes: Shapes, name: str, axes: str, path: object, *, ranks: tuple[int, ...] = (2,)
) -> Shape:
    shape = shapes.get(name)
    if shape is None or len(shape) not in ranks:
        raise CheckpointError(
            "a tensor that tells the model's sizes is missing or of the wrong rank",
            path=path,
            key=name,
            expected=f"[{axes}]",
            found="nothing" if shape is None else list(shape),
        )
    return shape


def _layers(shapes: Shapes, stack: str, path: object) -> int:
    numbers = set(_matches(rf"{stack}/layers_(\d+)/", shapes))
    if numbers != set(range(len(numbers))) or not numbers:
        raise CheckpointError(
            f"the {stack}'s layers are not numbered from 0 without a gap",
            path=path,
            expected=f"{stack}/layers_0, {stack}/layers_1, ...",
            found=", ".join(f"layers_{i}" for i in sorted(numbers)) or "no layers",
        )
    return len(numbers)


def _experts(shapes: Shapes) -> int:
    kernels = sorted(filter(is_expert, shapes))
    return next(iter(shapes[kernels[0]]), 0) if kernels else 0


def _matches(pattern: str, names: Iterable[str]) -> list[int]:
    return [int(match[1]) for match in map(re.compile(pattern).match, names) if match]
