"""Attention and feed-forward of single layers over stored hidden states, compiled once per stack."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.typing import DTypeLike

from qmoe_jax.config import SwitchConfig
from qmoe_jax.data.batching import round_up
from qmoe_jax.inference.blockwise.states import LENGTH_MULTIPLE, HiddenStates, PaddedExamples, mask_of
from qmoe_jax.models.attention import padding_bias
from qmoe_jax.models.layers import RMSNorm
from qmoe_jax.models.switch import Block, Decoder, DecoderBlock, Encoder, EncoderBlock

Params = dict[str, Any]


@partial(jax.jit, static_argnames="block")
def _attend(block: Block, params: Params, x: Array, *context: Array) -> Array:
    return block.apply({"params": params}, x, *context, method="attend")


@partial(jax.jit, static_argnames="block")
def _route(block: Block, params: Params, x: Array) -> tuple[Array, Array]:
    _, routing = block.apply({"params": params}, x, method="route")
    return routing.expert, routing.probability


@partial(jax.jit, static_argnames="block")
def _feed_forward(block: Block, params: Params, x: Array) -> Array:
    return block.apply({"params": params}, x, method="feed_forward")


@partial(jax.jit, static_argnames=("epsilon", "dtype"))
def _normed(scale: Array, x: Array, epsilon: float, dtype: DTypeLike) -> Array:
    return RMSNorm(epsilon, dtype).apply({"params": {"scale": scale}}, x)


@partial(jax.jit, static_argnames="encoder")
def _encoder_bias(encoder: Encoder, relpos: Params, mask: Array) -> Array:
    return encoder.apply({"params": {"relpos_bias": relpos}}, mask, method="bias")


@partial(jax.jit, static_argnames=("decoder", "length"))
def _decoder_bias(decoder: Decoder, relpos: Params, length: int) -> Array:
    return decoder.apply({"params": {"relpos_bias": relpos}}, length, method="bias")


class EncoderLayers:
    """Steps of the encoder's layers over stored hidden states.

    Attributes:
        config: the architecture.
        params: parameters of the stack; a step reads only those of its layer, and no experts.
        states: hidden states of all tokens, updated in place.
        batches: batches that cover all examples.
        dtype: dtype of the computation.
    """

    def __init__(
        self,
        config: SwitchConfig,
        stack_params: Params,
        states: HiddenStates,
        batches: list[PaddedExamples],
        dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.params, self.states, self.batches = config, stack_params, states, batches
        self.dtype = np.dtype(dtype)

    def block(self, layer: int) -> Block:
        """Return the module of a layer."""
        return EncoderBlock(self.config, layer in self.config.encoder_sparse_layers, dtype=self.dtype)

    def context(self, batch: PaddedExamples) -> tuple[Array, ...]:
        """Return the operands of attention besides the states: the position bias with the padding mask."""
        encoder = Encoder(self.config, dtype=self.dtype)
        return (
            _encoder_bias(encoder, self.params["relpos_bias"], jnp.asarray(self.states.visible_mask(batch))),
        )

    def gather(self, batch: PaddedExamples) -> np.ndarray:
        """Return the states of a batch in the dtype of the computation."""
        return self.states.gather(batch).astype(self.dtype, copy=False)

    def attend(self, layer: int) -> None:
        """Add a layer's attention to all states."""
        block, params = self.block(layer), self.params[f"layers_{layer}"]
        for batch in self.batches:
            x = _attend(block, params, self.gather(batch), *self.context(batch))
            self.states.scatter(batch, np.asarray(x))

    def route(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the expert (int32) and router probability (float32) of every token."""
        block, params = self.block(layer), self.params[f"layers_{layer}"]
        expert = np.empty(self.states.tokens, np.int32)
        probability = np.empty(self.states.tokens, np.float32)
        for batch in self.batches:
            chosen, chance = _route(block, params, self.gather(batch))
            real, where = mask_of(batch, self.states.lengths), self.states.flat(batch)
            expert[where], probability[where] = np.asarray(chosen)[real], np.asarray(chance)[real]
        return expert, probability

    def feed_forward(self, layer: int, params: Params | None = None) -> None:
        """Add a layer's feed-forward part to all states; `params` override the layer's."""
        block, params = self.block(layer), params or self.params[f"layers_{layer}"]
        for batch in self.batches:
            self.states.scatter(batch, np.asarray(_feed_forward(block, params, self.gather(batch))))

    def expert_inputs(self, layer: int, tokens: np.ndarray) -> np.ndarray:
        """Return the normalized states of `tokens`, the input of their experts, `[token, d_model]`."""
        scale = self.params[f"layers_{layer}"]["pre_mlp_layer_norm"]["scale"]
        size = 1 << max(len(tokens) - 1, 15).bit_length()
        rows = np.zeros((size, self.states.values.shape[1]), np.float32)
        rows[: len(tokens)] = self.states.values[tokens]
        return np.asarray(_normed(scale, rows, self.config.layer_norm_epsilon, self.dtype))[: len(tokens)]

    def add_experts(self, tokens: np.ndarray, probability: np.ndarray, outputs: np.ndarray) -> None:
        """Add expert outputs, scaled by the router probability, to the states of `tokens`."""
        added = probability[:, None].astype(self.dtype) * outputs
        self.states.values[tokens] = self.states.values[tokens].astype(self.dtype, copy=False) + added

    def final_norm(self, name: str = "encoder_norm") -> None:
        """Apply the stack's last norm to all states."""
        scale, epsilon = self.params[name]["scale"], self.config.layer_norm_epsilon
        for batch in self.batches:
            self.states.scatter(
                batch, np.asarray(_normed(scale, self.states.gather(batch), epsilon, self.dtype))
            )


class DecoderLayers(EncoderLayers):
    """Steps of the decoder's layers, which also attend to the encoder's final states `encoded`."""

    def __init__(
        self,
        config: SwitchConfig,
        stack_params: Params,
        states: HiddenStates,
        batches: list[PaddedExamples],
        encoded: HiddenStates,
        dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(config, stack_params, states, batches, dtype)
        self.encoded = encoded

    def block(self, layer: int) -> Block:
        """Return the module of a layer."""
        return DecoderBlock(self.config, layer in self.config.decoder_sparse_layers, dtype=self.dtype)

    def context(self, batch: PaddedExamples) -> tuple[Array, ...]:
        """Return the padded encoder states of the batch's examples and both biases."""
        longest = round_up(int(self.encoded.lengths[batch.examples].max()), LENGTH_MULTIPLE)
        padded = PaddedExamples(batch.examples, batch.rows, longest)
        mask = jnp.asarray(self.encoded.visible_mask(padded))
        encoded = self.encoded.gather(padded).astype(self.dtype, copy=False)
        bias = _decoder_bias(Decoder(self.config, dtype=self.dtype), self.params["relpos_bias"], batch.length)
        return jnp.asarray(encoded), bias, padding_bias(mask)
