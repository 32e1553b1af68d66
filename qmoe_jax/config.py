"""Architectures of Switch Transformers: the configuration class, and the published models."""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["relu", "gelu"]


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The ids that a model gives a meaning of their own; by default T5's.

    Attributes:
        pad: fills rows of unequal length, and what follows the end token in generated text.
        eos: ends encoder texts, and generation.
        decoder_start: begins the decoder's input.
    """

    pad: int = 0
    eos: int = 1
    decoder_start: int = 0


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
    """An encoder-decoder of T5 blocks, whose feed-forward layers are dense or route tokens to experts.

    Attributes:
        d_model: width of the hidden states.
        d_ff: width inside a feed-forward layer or expert.
        d_kv: width of an attention head. The heads together, `num_heads * d_kv`, need not be as wide as
            `d_model` (c-2048: 1,920 and 2,080).
        num_heads: attention heads per layer.
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder.
        num_experts: experts per sparse layer.
        encoder_sparse_layers: layers of the encoder that have experts.
        decoder_sparse_layers: layers of the decoder that have experts.
        vocab_size: rows of the embedding, padding included.
        activation: nonlinearity of the feed-forward layers.
        gated: whether these are `(activation(x wi_0) * (x wi_1)) wo` instead of `activation(x wi) wo`.
        tied: whether logits are computed with the embedding, scaled by `d_model ** -0.5`, instead of
            `logits_dense`, unscaled.
        relative_attention_buckets: buckets of the relative position bias.
        relative_attention_max_distance: distance from which on positions share the last bucket.
        layer_norm_epsilon: added to the variance in RMS norms.
        pad_id: id of padding.
        eos_id: id of the end token.
        decoder_start_id: id that decoder inputs begin with.
    """

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_experts: int
    encoder_sparse_layers: tuple[int, ...]
    decoder_sparse_layers: tuple[int, ...]
    vocab_size: int = 32128
    activation: Activation = "relu"
    gated: bool = False
    tied: bool = True
    relative_attention_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    pad_id: int = TokenIds.pad
    eos_id: int = TokenIds.eos
    decoder_start_id: int = TokenIds.decoder_start

    @property
    def token_ids(self) -> TokenIds:
        """The ids that texts and batches for this model are made with."""
        return TokenIds(self.pad_id, self.eos_id, self.decoder_start_id)

    def sparse_layers(self, stack: str) -> tuple[int, ...]:
        """Return the layers of `stack` ("encoder" or "decoder") that have experts."""
        return {"encoder": self.encoder_sparse_layers, "decoder": self.decoder_sparse_layers}[stack]

    def num_layers(self, stack: str) -> int:
        """Return the number of layers of `stack` ("encoder" or "decoder")."""
        return {"encoder": self.num_encoder_layers, "decoder": self.num_decoder_layers}[stack]

    @property
    def expert_parameters(self) -> int:
        """Number of parameters that belong to experts."""
        matrices = 3 if self.gated else 2
        sparse = len(self.encoder_sparse_layers) + len(self.decoder_sparse_layers)
        return sparse * self.num_experts * matrices * self.d_model * self.d_ff


def _published(layers: int, every: int, **kwargs: object) -> SwitchConfig:
    """Return a model whose layer i is sparse if `i % every == every - 1` (flaxformer's MIXED layout)."""
    sparse = tuple(range(every - 1, layers, every))
    return SwitchConfig(
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        encoder_sparse_layers=sparse,
        decoder_sparse_layers=sparse,
        **kwargs,  # type: ignore[arg-type]
    )


PRESETS: dict[str, SwitchConfig] = {
    **{
        f"switch-base-{experts}": _published(
            12, 2, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_experts=experts
        )
        for experts in (8, 16, 32, 64, 128, 256)
    },
    "switch-large-128": _published(24, 2, d_model=1024, d_ff=4096, d_kv=64, num_heads=16, num_experts=128),
    "switch-xxl-128": _published(
        24,
        2,
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_heads=64,
        num_experts=128,
        activation="gelu",
        gated=True,
        tied=False,
    ),
    "switch-c-2048": _published(
        15, 1, d_model=2080, d_ff=6144, d_kv=64, num_heads=30, num_experts=2048, tied=False
    ),
}
"""The published models, as in their training configurations and checkpoints; the Hub's configs differ."""
