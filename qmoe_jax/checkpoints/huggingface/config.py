"""config.json of a Hugging Face Switch Transformer, read with distrust and written in full.

The published ones of xxl and c-2048 contradict their own tensors, so the architecture is inferred from the
tensors. config.json gives what no shape tells; where the two disagree, a note says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_jax.checkpoints.architecture import Shapes, infer_config
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.reading import read_json
from qmoe_jax.parameters import STACKS

MODEL_TYPE = "switch_transformers"

GENERATION_CONFIG = "generation_config.json"

_TOKEN_IDS = {
    "pad_token_id": "pad_id",
    "eos_token_id": "eos_id",
    "decoder_start_token_id": "decoder_start_id",
}
# Key of config.json -> field of `SwitchConfig` that no tensor's shape tells.
_SETTINGS = {
    "relative_attention_max_distance": "relative_attention_max_distance",
    "layer_norm_epsilon": "layer_norm_epsilon",
    **_TOKEN_IDS,
}
# The same for fields that the tensors tell.
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
# Hugging Face's "gelu" is the exact one. The gated model was trained with the tanh approximation, which its
# config calls "gelu" too.
_ACTIVATIONS = {False: {"relu": "relu", "gelu_new": "gelu"}, True: {"gelu": "gelu", "gelu_new": "gelu"}}


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The values that a member of config.json may have, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_epsilon(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


# null states nothing, except where it would say that a model has no such token, or is not tied.
_ID = _Rule("one token id, an integer of 0 or more", lambda value: _is_int(value, 0))
_SIZE = _Rule("an integer of 1 or more", lambda value: value is None or _is_int(value, 1))
_COUNT = _Rule("an integer of 0 or more", lambda value: value is None or _is_int(value, 0))
_FLAG = _Rule("true or false", lambda value: value is None or isinstance(value, bool))
_TIED = _Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = _Rule("a string", lambda value: value is None or isinstance(value, str))
_EPSILON = _Rule("a finite number of 0 or more", lambda value: value is None or _is_epsilon(value))
_RULES = {
    **dict.fromkeys(_SIZES, _SIZE),
    "is_gated_act": _FLAG,
    "tie_word_embeddings": _TIED,
    **dict.fromkeys(("num_experts", *(f"num_sparse_{stack}_layers" for stack in STACKS)), _COUNT),
    **dict.fromkeys(("model_type", "dense_act_fn"), _TEXT),
    **dict.fromkeys(_TOKEN_IDS, _ID),
    "relative_attention_max_distance": _SIZE,
    "layer_norm_epsilon": _EPSILON,
}


def _found(value: Any) -> str:
    """Return a JSON value with its type, cut short."""
    text = json.dumps(value)
    kinds = {bool: "a boolean", int: "an integer", float: "a number with a fraction", str: "a string"}
    kind = {**kinds, list: "a list", dict: "an object"}.get(type(value))
    return (text if len(text) <= 60 else f"{text[:60]}...") + (f" ({kind})" if kind else "")


def read_stated(path: Path) -> dict[str, Any]:
    """Return what a config.json states, sizes that are null left out.

    Raises:
        CheckpointError: the file is not a JSON object, or a member that is read here has another type than
            `transformers` gives it.
    """
    stated = read_json(path)
    for key, value in stated.items():
        if (rule := _RULES.get(key)) and not rule.holds(value):
            raise CheckpointError(
                "a member of the wrong type or value",
                path=path,
                key=key,
                expected=rule.expected,
                found=_found(value),
                remedy=f"correct {key}, or leave it out where the model has what Switch Transformers have",
            )
    return {key: value for key, value in stated.items() if value is not None}


def configure(stated: Mapping[str, Any], shapes: Shapes, directory: Path) -> tuple[SwitchConfig, list[str]]:
    """Return the architecture that tensors and `stated`, a config.json, give; and what they disagree about.

    Args:
        stated: as `read_stated` returns it.
        shapes: T5X's names -> shapes.
        directory: the checkpoint's, for errors and for its generation_config.json.

    Raises:
        CheckpointError: another kind of model, tensors that do not fit together, an unknown activation, or a
            token id outside the vocabulary.
    """
    path = directory / "config.json"
    gated = any(name.endswith("/wi_0/kernel") for name in shapes)
    config = infer_config(shapes, directory, **settings(stated, gated=gated, path=path))
    for key, field in _TOKEN_IDS.items():
        if (found := getattr(config, field)) >= config.vocab_size:
            raise CheckpointError(
                "a token id outside the vocabulary",
                path=path,
                key=key,
                expected=f"0 to {config.vocab_size - 1}, the rows of the embedding",
                found=found if key in stated else f"nothing, so T5's {found}",
                remedy=f"set {key} to the id that the model was trained with",
            )
    if config.pad_id != config.decoder_start_id and "decoder_start_token_id" not in stated:
        raise CheckpointError(
            "a decoder without a start token",
            path=path,
            key="decoder_start_token_id",
            expected=f"an id, as pad_token_id is {config.pad_id}: T5's decoder starts with padding, id 0",
            found="nothing",
            remedy="set decoder_start_token_id to the id that the model was trained with",
        )
    return config, contradictions(stated, config) + _generation_differences(directory, config)


def settings(stated: Mapping[str, Any], *, gated: bool, path: Path) -> dict[str, Any]:
    """Return the fields of `SwitchConfig` that `stated`, a config.json, gives and no tensor tells.

    Raises:
        CheckpointError: it states another kind of model, or an activation that Switch Transformers do not
            have.
    """
    model_type = stated.get("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            "is not a Switch Transformer", path=path, key="model_type", expected=MODEL_TYPE, found=model_type
        )
    told = {field: stated[key] for key, field in _SETTINGS.items() if key in stated}
    activation = stated.get("dense_act_fn", "gelu" if gated else "relu")
    known = _ACTIVATIONS[gated]
    if activation not in known:
        raise CheckpointError(
            "the experts have no such activation",
            path=path,
            key="dense_act_fn",
            expected=" or ".join(known),
            found=activation,
        )
    return {**told, "activation": known[activation]}


def contradictions(stated: Mapping[str, Any], config: SwitchConfig) -> list[str]:
    """Return a sentence for each member of `stated` that contradicts the tensors."""
    told = {key: getattr(config, field) for key, field in _SIZES.items()}
    for stack in STACKS:
        told[f"num_sparse_{stack}_layers"] = len(config.sparse_layers(stack))
    return [
        f"config.json says {key} {stated[key]}, the tensors say {value}"
        for key, value in told.items()
        if key in stated and stated[key] != value
    ]


def _generation_differences(directory: Path, config: SwitchConfig) -> list[str]:
    """Return a note for each token id that generation_config.json gives otherwise than config.json."""
    path = directory / GENERATION_CONFIG
    stated = read_json(path) if path.is_file() else {}
    told = {key: getattr(config, field) for key, field in _TOKEN_IDS.items()}
    return [
        f"{GENERATION_CONFIG} says {key} {json.dumps(found)}, and is ignored: config.json's {value} is used"
        for key, value in told.items()
        if (found := stated.get(key, value)) != value
    ]


def config_json(config: SwitchConfig, dtype: np.dtype) -> dict[str, Any]:
    """Return a config.json that `transformers` builds this model from, with every field that it reads.

    Raises:
        CheckpointError: no sparse step describes the pattern of sparse layers.
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
        # No token is dropped: what QMoE evaluates, and what generating one token per step computes anyway.
        "expert_capacity": 4096,
        "router_bias": False,
        "router_dtype": "float32",
        "router_jitter_noise": 0.0,
        "router_ignore_padding_tokens": False,
        "dropout_rate": 0.0,
        "use_cache": True,
    }


def _sparse_step(config: SwitchConfig, stack: str) -> int:
    """Return the step of a pattern: layer i is sparse if i % step is 1 (1: every layer, 0: none)."""
    layers, sparse = config.num_layers(stack), config.sparse_layers(stack)
    for step in range(layers + 1):
        if sparse == _pattern(layers, step):
            return step
    raise CheckpointError(
        "sparse-layer pattern cannot be expressed in config.json",
        path="config.json",
        key=f"{stack}_sparse_step",
        expected="all, none, or the layers i with i % step = 1",
        found=sparse,
    )


def _pattern(layers: int, step: int) -> tuple[int, ...]:
    if step == 1:
        return tuple(range(layers))
    return tuple(range(1, layers, step)) if step else ()
