"""The architecture of a Switch Transformer: frozen, without I/O."""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["relu", "gelu"]


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
    """An encoder-decoder of T5 blocks whose feed-forward parts are dense or routed to one of several experts.

    Shapes are the checkpoint's: attention is `num_heads * d_kv` wide, which need not be `d_model` (c-2048: 1,920
    and 2,080). `encoder_sparse_layers` and `decoder_sparse_layers` list the layers that have experts. With `gated`
    a feed-forward part is `(activation(x wi_0) * (x wi_1)) wo`, else `activation(x wi) wo`. `tied` models read
    their logits off the embedding, scaled by `d_model ** -0.5`; the others have a `logits_dense`, unscaled.
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
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0

    def sparse_layers(self, stack: str) -> tuple[int, ...]:
        """The layers of `stack` ('encoder' or 'decoder') that have experts."""
        return {"encoder": self.encoder_sparse_layers, "decoder": self.decoder_sparse_layers}[stack]

    def num_layers(self, stack: str) -> int:
        """The number of layers of `stack` ('encoder' or 'decoder')."""
        return {"encoder": self.num_encoder_layers, "decoder": self.num_decoder_layers}[stack]

    @property
    def expert_parameters(self) -> int:
        """Parameters that lie in experts."""
        matrices = 3 if self.gated else 2
        sparse = len(self.encoder_sparse_layers) + len(self.decoder_sparse_layers)
        return sparse * self.num_experts * matrices * self.d_model * self.d_ff


def _published(layers: int, every: int, **kwargs: object) -> SwitchConfig:
    """Layer i is sparse where `i % every == every - 1`, in both stacks (flaxformer's MIXED layout)."""
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
"""The published models, as their training configurations and checkpoints have them (not as their Hub configs say)."""
