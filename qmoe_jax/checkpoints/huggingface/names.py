"""T5X's parameter names and Hugging Face's, both ways (names only: transposing is the readers' matter)."""

from __future__ import annotations

import dataclasses
import re

from qmoe_jax import parameters
from qmoe_jax.checkpoints.architecture import attention_blocks
from qmoe_jax.parameters import LOGITS, STACKS

_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_HUGGINGFACE_ATTENTION = {
    "attention": "layer.0.SelfAttention",
    "self_attention": "layer.0.SelfAttention",
    "encoder_decoder_attention": "layer.1.EncDecAttention",
}
_FEED_FORWARD_LAYER = {"encoder": 1, "decoder": 2}

EMBEDDING = "shared.weight"
# Copies of the embedding that Hugging Face's tied models store beside it.
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The output head: of tied models a copy of the embedding; of the large ones it is filed under the decoder.
HEAD, DECODER_HEAD = "lm_head.weight", "decoder.lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor belongs: a T5X name, and for one expert's kernel the expert."""

    name: str
    expert: int | None = None


def _patterns() -> dict[str, str]:
    """T5X name -> Hugging Face name, `*` for the layer and, after it, for the expert."""
    table = {parameters.EMBEDDING: EMBEDDING, LOGITS: HEAD}
    for stack in STACKS:
        layer, block = f"{stack}/layers_*", f"{stack}.block.*"
        feed_forward = f"{block}.layer.{_FEED_FORWARD_LAYER[stack]}"
        table[f"{stack}/{stack}_norm/scale"] = f"{stack}.final_layer_norm.weight"
        table[f"{stack}/relpos_bias/rel_embedding"] = (
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        )
        for attention, norm in attention_blocks(stack).items():
            module = f"{block}.{_HUGGINGFACE_ATTENTION[attention]}"
            table[f"{layer}/{norm}/scale"] = f"{module.rsplit('.', maxsplit=1)[0]}.layer_norm.weight"
            for projection, letter in _PROJECTIONS.items():
                table[f"{layer}/{attention}/{projection}/kernel"] = f"{module}.{letter}.weight"
        table[f"{layer}/pre_mlp_layer_norm/scale"] = f"{feed_forward}.layer_norm.weight"
        table[f"{layer}/mlp/router/router_weights/w/kernel"] = f"{feed_forward}.mlp.router.classifier.weight"
        for matrix in ("wi", "wi_0", "wi_1", "wo"):
            table[f"{layer}/mlp/{matrix}/kernel"] = f"{feed_forward}.mlp.{matrix}.weight"
            table[f"{layer}/mlp/expert/{matrix}/kernel"] = (
                f"{feed_forward}.mlp.experts.expert_*.{matrix}.weight"
            )
    return table


_TO_HUGGINGFACE = _patterns()
# The position bias is stored in block 0 by name, so its pattern must not lose that number.
_TO_T5X = {re.sub(r"block\.0\.", "block.*.", theirs): ours for ours, theirs in _TO_HUGGINGFACE.items()}


def to_huggingface(name: str, expert: int | None = None) -> str:
    """The Hugging Face name of a T5X parameter, of an expert kernel that of one expert.

    Raises `KeyError` for a name that Switch Transformers do not have.
    """
    theirs = _TO_HUGGINGFACE[re.sub(r"layers_\d+", "layers_*", name)]
    if layer := re.search(r"layers_(\d+)", name):
        theirs = theirs.replace("*", layer[1], 1)
    return theirs.replace("*", str(expert)) if expert is not None else theirs


def to_t5x(name: str) -> Place | None:
    """Where a Hugging Face tensor belongs, or None for one that no Switch Transformer has.

    The head is `decoder/logits_dense/kernel` under either of its names, and the embedding's copies are the
    embedding: whether a head is a copy too, the name does not tell.
    """
    name = name.replace("/", ".")  # as an early conversion script wrote them into its index
    if name in EMBEDDING_COPIES:
        return Place(parameters.EMBEDDING)
    if name == DECODER_HEAD:
        return Place(LOGITS)
    ours = _TO_T5X.get(re.sub(r"(block\.|expert_)\d+", r"\1*", name))
    if ours is None:
        return None
    layer, expert = re.search(r"block\.(\d+)\.", name), re.search(r"expert_(\d+)\.", name)
    if "rel_embedding" in ours and layer is not None and layer[1] != "0":
        return None
    if layer:
        ours = ours.replace("*", layer[1])
    return Place(ours, int(expert[1]) if expert else None)
