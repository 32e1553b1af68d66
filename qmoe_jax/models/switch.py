"""Switch Transformer: T5's encoder-decoder, dense or routed feed-forward parts, T5X's parameter names."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.attention import Attention, RelativePositionBias, causal_bias, padding_bias
from qmoe_jax.models.experts import DenseMLP, SwitchMLP
from qmoe_jax.models.layers import Dense, Embedding, RMSNorm
from qmoe_jax.models.router import CapacityRule, Routing


class Block(nn.Module):
    """Base of encoder and decoder blocks: the pre-norm feed-forward part, dense or with experts."""

    config: SwitchConfig
    sparse: bool
    capacity: CapacityRule | None = None
    dtype: DTypeLike = jnp.float32

    def _attention(self) -> Attention:
        c = self.config
        return Attention(c.d_model, c.num_heads, c.d_kv, self.dtype)

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config.layer_norm_epsilon, self.dtype)

    def setup(self) -> None:
        self.pre_mlp_layer_norm = self._norm()
        if self.sparse:
            self.mlp = SwitchMLP(self.config, self.capacity, self.dtype)
        else:
            self.mlp = DenseMLP(self.config, self.dtype)

    def mlp_input(self, x: Float[Array, "b n embed"]) -> Float[Array, "b n embed"]:
        """Return the normalized input of the feed-forward part."""
        return self.pre_mlp_layer_norm(x)

    def route(self, x: Float[Array, "b n embed"]) -> tuple[Float[Array, "b n embed"], Routing]:
        """Return the normalized input of a sparse block's experts and its routing."""
        normed = self.mlp_input(x)
        return normed, self.mlp.route(normed)

    def feed_forward(self, x: Float[Array, "b n embed"]) -> Float[Array, "b n embed"]:
        """Return `x` plus the feed-forward part."""
        return x + self.mlp(self.mlp_input(x))


class EncoderBlock(Block):
    """Block of self-attention and feed-forward."""

    def setup(self) -> None:
        super().setup()
        self.pre_attention_layer_norm = self._norm()
        self.attention = self._attention()

    def attend(
        self, x: Float[Array, "b n embed"], bias: Float[Array, "#b heads n n"]
    ) -> Float[Array, "b n embed"]:
        """Return `x` plus self-attention."""
        normed = self.pre_attention_layer_norm(x)
        return x + self.attention(normed, normed, bias)

    def __call__(
        self, x: Float[Array, "b n embed"], bias: Float[Array, "#b heads n n"]
    ) -> Float[Array, "b n embed"]:
        """Return the output of the block."""
        return self.feed_forward(self.attend(x, bias))


class DecoderBlock(Block):
    """Block of causal self-attention, cross-attention and feed-forward."""

    def setup(self) -> None:
        super().setup()
        self.pre_self_attention_layer_norm = self._norm()
        self.self_attention = self._attention()
        self.pre_cross_attention_layer_norm = self._norm()
        self.encoder_decoder_attention = self._attention()

    def attend(
        self,
        x: Float[Array, "b m embed"],
        encoded: Float[Array, "b n embed"],
        bias: Float[Array, "#b heads m m"],
        cross_bias: Float[Array, "b 1 1 n"],
    ) -> Float[Array, "b m embed"]:
        """Return `x` plus self-attention and cross-attention."""
        normed = self.pre_self_attention_layer_norm(x)
        x = x + self.self_attention(normed, normed, bias)
        return x + self.encoder_decoder_attention(self.pre_cross_attention_layer_norm(x), encoded, cross_bias)

    def __call__(
        self,
        x: Float[Array, "b m embed"],
        encoded: Float[Array, "b n embed"],
        bias: Float[Array, "#b heads m m"],
        cross_bias: Float[Array, "b 1 1 n"],
    ) -> Float[Array, "b m embed"]:
        """Return the output of the block."""
        return self.feed_forward(self.attend(x, encoded, bias, cross_bias))

    def step(
        self,
        x: Float[Array, "b 1 embed"],
        encoded: Float[Array, "b n embed"],
        position: Int[Array, ""],
        length: int,
        bias: Float[Array, "#b heads 1 l"],
        cross_bias: Float[Array, "b 1 1 n"],
    ) -> Float[Array, "b 1 embed"]:
        """Return the output of the block for one token, with key-value caches of `length` tokens."""
        normed = self.pre_self_attention_layer_norm(x)
        x = x + self.self_attention.step(normed, position, length, bias)
        normed = self.pre_cross_attention_layer_norm(x)
        x = x + self.encoder_decoder_attention.cross_step(normed, encoded, cross_bias)
        return self.feed_forward(x)


def _relative_position_bias(
    config: SwitchConfig, bidirectional: bool, dtype: DTypeLike
) -> RelativePositionBias:
    return RelativePositionBias(
        config.num_heads,
        bidirectional,
        config.relative_attention_buckets,
        config.relative_attention_max_distance,
        dtype,
    )


class Encoder(nn.Module):
    """Encoder stack."""

    config: SwitchConfig
    capacity: CapacityRule | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = _relative_position_bias(c, True, self.dtype)
        self.layers = [
            EncoderBlock(c, i in c.encoder_sparse_layers, self.capacity, self.dtype)
            for i in range(c.num_encoder_layers)
        ]
        self.encoder_norm = RMSNorm(c.layer_norm_epsilon, self.dtype)

    def bias(self, mask: Bool[Array, "b n"]) -> Float[Array, "b heads n n"]:
        """Return position bias plus padding mask, the same for every layer."""
        positions = jnp.arange(mask.shape[1], dtype=jnp.int32)
        return self.relpos_bias(positions, positions) + padding_bias(mask).astype(self.dtype)

    def __call__(self, x: Float[Array, "b n embed"], mask: Bool[Array, "b n"]) -> Float[Array, "b n embed"]:
        """Return the output of all blocks and the final norm."""
        bias = self.bias(mask)
        for block in self.layers:
            x = block(x, bias)
        return self.encoder_norm(x)


class Decoder(nn.Module):
    """Decoder stack, with the output projection of untied models."""

    config: SwitchConfig
    capacity: CapacityRule | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = _relative_position_bias(c, False, self.dtype)
        self.layers = [
            DecoderBlock(c, i in c.decoder_sparse_layers, self.capacity, self.dtype)
            for i in range(c.num_decoder_layers)
        ]
        self.decoder_norm = RMSNorm(c.layer_norm_epsilon, self.dtype)
        if not c.tied:
            self.logits_dense = Dense(c.vocab_size, ("embed", "vocab"), self.dtype)

    def bias(self, length: int) -> Float[Array, "1 heads m m"]:
        """Return position bias plus causal mask, the same for every layer."""
        positions = jnp.arange(length, dtype=jnp.int32)
        causal = causal_bias(positions, positions).astype(self.dtype)
        return self.relpos_bias(positions, positions) + causal

    def head(self, x: Float[Array, "b m embed"]) -> Float[Array, "b m embed"] | Float[Array, "b m vocab"]:
        """Apply the final norm and, in untied models, the output projection."""
        x = self.decoder_norm(x)
        return x if self.config.tied else self.logits_dense(x).astype(jnp.float32)

    def __call__(
        self, x: Float[Array, "b m embed"], encoded: Float[Array, "b n embed"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b m _"]:
        """Return the output of all blocks and the head."""
        bias, cross_bias = self.bias(x.shape[1]), padding_bias(mask)
        for block in self.layers:
            x = block(x, encoded, bias, cross_bias)
        return self.head(x)

    def step(
        self,
        x: Float[Array, "b 1 embed"],
        encoded: Float[Array, "b n embed"],
        mask: Bool[Array, "b n"],
        position: Int[Array, ""],
        length: int,
    ) -> Float[Array, "b 1 _"]:
        """Return the output of all blocks and the head for the token at `position`."""
        query, keys = position[None], jnp.arange(length, dtype=position.dtype)
        bias = self.relpos_bias(query, keys) + causal_bias(query, keys).astype(self.dtype)
        cross_bias = padding_bias(mask)
        for block in self.layers:
            x = block.step(x, encoded, position, length, bias, cross_bias)
        return self.head(x)


class SwitchTransformer(nn.Module):
    """Switch Transformer (arXiv 2101.03961).

    The parameter tree has T5X's names, so that T5X checkpoints load unchanged. Expert kernels may be
    `PackedMatrix` values under the same names.

    Attributes:
        config: the architecture.
        capacity: rule for tokens beyond an expert's capacity; None drops none.
        dtype: dtype of the computation.
    """

    config: SwitchConfig
    capacity: CapacityRule | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.token_embedder = Embedding(c.vocab_size, c.d_model, self.dtype)
        self.encoder = Encoder(c, self.capacity, self.dtype)
        self.decoder = Decoder(c, self.capacity, self.dtype)

    def _mask(self, tokens: Int[Array, "b n"], mask: Bool[Array, "b n"] | None) -> Bool[Array, "b n"]:
        return tokens != self.config.pad_id if mask is None else mask

    def _logits(self, x: Float[Array, "b m _"]) -> Float[Array, "b m vocab"]:
        return self.token_embedder.attend(x) if self.config.tied else x

    def encode(
        self, tokens: Int[Array, "b n"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n embed"]:
        """Return the encoder output after the final norm.

        `mask` is False on padding, by default at the padding id.
        """
        return self.encoder(self.token_embedder(tokens), self._mask(tokens, mask))

    def decode(
        self, tokens: Int[Array, "b m"], encoded: Float[Array, "b n embed"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b m vocab"]:
        """Return the logits of all decoder positions, float32."""
        return self._logits(self.decoder(self.token_embedder(tokens), encoded, mask))

    def decode_step(
        self,
        token: Int[Array, "b 1"],
        encoded: Float[Array, "b n embed"],
        mask: Bool[Array, "b n"],
        position: Int[Array, ""],
        length: int,
    ) -> Float[Array, "b 1 vocab"]:
        """Return the logits after one more token; the collection "cache" has room for `length` tokens."""
        x = self.decoder.step(self.token_embedder(token), encoded, mask, position, length)
        return self._logits(x)

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "b n"],
        decoder_input_tokens: Int[Array, "b m"],
        encoder_mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b m vocab"]:
        """Return float32 logits of the decoder tokens (start token first) given the encoder tokens."""
        mask = self._mask(encoder_input_tokens, encoder_mask)
        return self.decode(decoder_input_tokens, self.encode(encoder_input_tokens, mask), mask)
