"""config.json of a Hugging Face Switch Transformer, read with distrust and written in full.

The published ones of xxl and c-2048 contradict their own tensors, so a reader takes the architecture from the
tensors. config.json tells what no shape can; where the two disagree, a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.parameters import STACKS

MODEL_TYPE = "switch_transformers"

# config.json's key -> the field of `SwitchConfig`, where no tensor's shape tells it.
_SETTINGS = {
    "relative_attention_max_distance": "relative_attention_max_distance",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "pad_token_id": "pad_id",
    "eos_token_id": "eos_id",
    "decoder_start_token_id": "decoder_start_id",
}
# The same where the tensors do tell.
_SIZES = {
    "d_model": "d_model",
    "d_ff": "d_ff",
    "d_kv": "d_kv",
    "num_heads": "num_heads",
    "num_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_experts": "num_experts",
    "vocab_size": "vocab_size",
    "relative_attention_num_buckets": "relative_attention_buckets",
    "is_gated_act": "gated",
    "tie_word_embeddings": "tied",
}
# Hugging Face's "gelu" is the exact one. The gated model's was trained as the tanh approximation, which its
# config calls "gelu" too.
_ACTIVATIONS = {False: {"relu": "relu", "gelu_new": "gelu"}, True: {"gelu": "gelu", "gelu_new": "gelu"}}


def settings(stated: Mapping[str, Any], *, gated: bool, path: Path) -> dict[str, Any]:
    """The fields of `SwitchConfig` that `stated`, a config.json, tells and no tensor does.

    Raises:
        CheckpointError: it states another kind of model, or an activation that Switch Transformers do not
            have.
    """
    model_type = stated.get("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            "not a Switch Transformer", path=path, key="model_type", expected=MODEL_TYPE, found=model_type
        )
    told = {field: stated[key] for key, field in _SETTINGS.items() if stated.get(key) is not None}
    activation = stated.get("dense_act_fn", "gelu" if gated else "relu")
    known = _ACTIVATIONS[gated]
    if activation not in known:
        raise CheckpointError(
            "an activation that these experts do not have",
            path=path,
            key="dense_act_fn",
            expected=" or ".join(known),
            found=activation,
        )
    return {**told, "activation": known[activation]}


def contradictions(stated: Mapping[str, Any], config: SwitchConfig) -> list[str]:
    """What `stated` says otherwise than the tensors, a sentence each."""
    told = {key: getattr(config, field) for key, field in _SIZES.items()}
    for stack in STACKS:
        told[f"num_sparse_{stack}_layers"] = len(config.sparse_layers(stack))
    return [
        f"config.json says {key} {stated[key]}, the tensors say {value}"
        for key, value in told.items()
        if key in stated and stated[key] != value
    ]


def config_json(config: SwitchConfig, dtype: np.dtype) -> dict[str, Any]:
    """A config.json that `transformers` builds this model from; every field that it reads is there.

    Raises:
        CheckpointError: the sparse layers are in no pattern that a sparse step describes.
    """
    stacks = {stack: _sparse_step(config, stack) for stack in STACKS}
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "is_encoder_decoder": True,
        **{key: getattr(config, field) for key, field in {**_SIZES, **_SETTINGS}.items()},
        **{f"{stack}_sparse_step": step for stack, step in stacks.items()},
        **{f"num_sparse_{stack}_layers": len(config.sparse_layers(stack)) for stack in stacks},
        "dense_act_fn": "gelu_new" if config.activation == "gelu" else "relu",
        "feed_forward_proj": "gated-gelu" if config.gated else config.activation,
        "dtype": dtype.name,
        "torch_dtype": dtype.name,
        # A token is never dropped: what QMoE evaluates, and what a cache of one token a step computes anyway.
        "expert_capacity": 4096,
        "router_bias": False,
        "router_dtype": "float32",
        "router_jitter_noise": 0.0,
        "router_ignore_padding_tokens": False,
        "dropout_rate": 0.0,
        "use_cache": True,
    }


def _sparse_step(config: SwitchConfig, stack: str) -> int:
    """`transformers` makes layer i sparse where i % step is 1, or every layer where step is 1; 0: none."""
    layers, sparse = config.num_layers(stack), config.sparse_layers(stack)
    for step in range(layers + 1):
        if sparse == _pattern(layers, step):
            return step
    raise CheckpointError(
        "a pattern of sparse layers that config.json cannot say",
        path="config.json",
        key=f"{stack}_sparse_step",
        expected="all, none, or the layers i with i % step = 1",
        found=sparse,
    )


def _pattern(layers: int, step: int) -> tuple[int, ...]:
    if step == 1:
        return tuple(range(layers))
    return tuple(range(1, layers, step)) if step else ()
