"""Attention and feed-forward of single layers over stored hidden states, compiled once per stack."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from qmoe_jax.config import SwitchConfig
from qmoe_jax.data.batching import round_up
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.blockwise.states import LENGTH_MULTIPLE, HiddenStates, PaddedExamples, mask_of
from qmoe_jax.models.attention import padding_bias
from qmoe_jax.models.layers import RMSNorm
from qmoe_jax.models.switch import Block, Decoder, DecoderBlock, Encoder, EncoderBlock

Params = dict[str, Any]


def experts_per_layer(config: SwitchConfig, stack: str) -> list[int]:
    """Return the number of experts of each layer of a stack; a dense layer counts as one."""
    sparse = config.sparse_layers(stack)
    return [config.num_experts if layer in sparse else 1 for layer in range(config.num_layers(stack))]


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


def _sound(states: np.ndarray) -> np.ndarray:
    """Return which tokens of `[*token, feature]` have a finite sum of squares, as the norms compute it.

    A norm would make zeros of finite states whose squares overflow, and nobody would know.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rows = states.astype(np.float32, copy=False)
        return np.isfinite(np.einsum("...e,...e->...", rows, rows))


def overflow_error(
    dtype: DTypeLike, path: object, stack: str, part: str, example: int, token: int
) -> CheckpointError:
    """Return the error for a hidden state that is not finite.

    Args:
        dtype: dtype of the computation.
        path: the checkpoint.
        stack: "encoder" or "decoder".
        part: the layer and its part that made it.
        example: number of the example.
        token: position of the token in it.
    """
    return CheckpointError(
        f"the model overflows in {np.dtype(dtype)}",
        path=path,
        key=f"{stack} {part}",
        expected="numbers whose squares are finite in float32",
        found=f"others, first for token {token} of example {example}",
        remedy="the weights of this layer, or of one before it, are too large: the checkpoint is damaged "
        "or its training diverged; take another copy",
    )


class EncoderLayers:
    """Steps of the encoder's layers over stored hidden states.

    A step raises `CheckpointError` where it makes a hidden state or router probability that is not finite; it
    names the checkpoint, the layer, its part and the token.

    Attributes:
        stack: name of the stack.
        config: the architecture.
        params: parameters of the stack; a step reads only those of its layer, and no experts.
        states: hidden states of all tokens, updated in place.
        batches: batches that cover all examples.
        dtype: dtype of the computation.
        path: the checkpoint, for errors.
    """

    stack = "encoder"

    def __init__(
        self,
        config: SwitchConfig,
        stack_params: Params,
        states: HiddenStates,
        batches: list[PaddedExamples],
        dtype: DTypeLike = jnp.float32,
        *,
        path: object,
    ):
        self.config, self.params, self.states, self.batches = config, stack_params, states, batches
        self.dtype, self.path = np.dtype(dtype), path

    def block(self, layer: int) -> Block:
        """Return the module of a layer."""
        return EncoderBlock(self.config, layer in self.config.encoder_sparse_layers, dtype=self.dtype)

    def context(self, batch: PaddedExamples) -> tuple[Array, ...]:
        """Return the operands of attention besides the states: the position bias with the padding mask."""
        encoder = Encoder(self.config, dtype=self.dtype)
        return (
            _encoder_bias(
                encoder, self.params["relpos_bias"], jnp.asarray(mask_of(batch, self.states.lengths))
            ),
        )

    def gather(self, batch: PaddedExamples) -> np.ndarray:
        """Return the states of a batch in the dtype of the computation."""
        return self.states.gather(batch).astype(self.dtype, copy=False)

    def attend(self, layer: int) -> None:
        """Add a layer's attention to all states."""
        block, params = self.block(layer), self.params[f"layers_{layer}"]
        for batch in self.batches:
            x = _attend(block, params, self.gather(batch), *self.context(batch))
            self._store(batch, x, f"layer {layer}, attention")

    def route(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the expert (int32) and router probability (float32) of every token."""
        block, params = self.block(layer), self.params[f"layers_{layer}"]
        expert = np.empty(self.states.tokens, np.int32)
        probability = np.empty(self.states.tokens, np.float32)
        for batch in self.batches:
            chosen, chance = _route(block, params, self.gather(batch))
            real, where = mask_of(batch, self.states.lengths), self.states.flat(batch)
            expert[where], probability[where] = np.asarray(chosen)[real], np.asarray(chance)[real]
            self._require_finite(np.isfinite(probability[where]), where, f"layer {layer}, router")
        return expert, probability

    def feed_forward(self, layer: int, params: Params | None = None) -> None:
        """Add a layer's feed-forward part to all states; `params` override the layer's."""
        block, params = self.block(layer), params or self.params[f"layers_{layer}"]
        for batch in self.batches:
            x = _feed_forward(block, params, self.gather(batch))
            self._store(batch, x, f"layer {layer}, feed-forward part")

    def expert_inputs(self, layer: int, tokens: np.ndarray) -> np.ndarray:
        """Return the normalized states of `tokens`, the input of their experts, `[token, d_model]`."""
        scale = self.params[f"layers_{layer}"]["pre_mlp_layer_norm"]["scale"]
        size = 1 << max(len(tokens) - 1, 15).bit_length()
        rows = np.zeros((size, self.states.values.shape[1]), np.float32)
        rows[: len(tokens)] = self.states.values[tokens]
        return np.asarray(_normed(scale, rows, self.config.layer_norm_epsilon, self.dtype))[: len(tokens)]

    def add_experts(
        self, layer: int, tokens: np.ndarray, probability: np.ndarray, outputs: np.ndarray
    ) -> None:
        """Add a layer's expert outputs, scaled by the router probability, to the states of `tokens`."""
        with np.errstate(over="ignore", invalid="ignore"):
            added = probability[:, None].astype(self.dtype) * outputs
            states = self.states.values[tokens].astype(self.dtype, copy=False) + added
        self._require_finite(_sound(states), tokens, f"layer {layer}, experts")
        self.states.values[tokens] = states

    def final_norm(self, name: str = "encoder_norm") -> None:
        """Apply the stack's last norm to all states."""
        scale, epsilon = self.params[name]["scale"], self.config.layer_norm_epsilon
        for batch in self.batches:
            x = _normed(scale, self.states.gather(batch), epsilon, self.dtype)
            self._store(batch, x, "final norm")

    def _store(self, batch: PaddedExamples, states: Array, part: str) -> None:
        """Write the states of a batch back, once those of its tokens are finite."""
        padded = np.asarray(states)
        sound = _sound(padded)
        if not sound.all():  # those of padding do not matter
            real = mask_of(batch, self.states.lengths)
            self._require_finite(sound[real], self.states.flat(batch), part)
        self.states.scatter(batch, padded)

    def _require_finite(self, sound: np.ndarray, tokens: np.ndarray, part: str) -> None:
        if sound.all():
            return
        token = int(tokens[sound.argmin()])
        example = int(np.searchsorted(self.states.offsets, token, side="right")) - 1
        raise overflow_error(
            self.dtype, self.path, self.stack, part, example, token - int(self.states.offsets[example])
        )


class DecoderLayers(EncoderLayers):
    """Steps of the decoder's layers, which also attend to the encoder's final states `encoded`."""

    stack = "decoder"

    def __init__(
        self,
        config: SwitchConfig,
        stack_params: Params,
        states: HiddenStates,
        batches: list[PaddedExamples],
        encoded: HiddenStates,
        dtype: DTypeLike = jnp.float32,
        *,
        path: object,
    ):
        super().__init__(config, stack_params, states, batches, dtype, path=path)
        self.encoded = encoded

    def block(self, layer: int) -> Block:
        """Return the module of a layer."""
        return DecoderBlock(self.config, layer in self.config.decoder_sparse_layers, dtype=self.dtype)

    def context(self, batch: PaddedExamples) -> tuple[Array, ...]:
        """Return the padded encoder states of the batch's examples and both biases."""
        longest = round_up(int(self.encoded.lengths[batch.examples].max()), LENGTH_MULTIPLE)
        padded = PaddedExamples(batch.examples, batch.rows, longest)
        mask = jnp.asarray(mask_of(padded, self.encoded.lengths))
        encoded = self.encoded.gather(padded).astype(self.dtype, copy=False)
        bias = _decoder_bias(Decoder(self.config, dtype=self.dtype), self.params["relpos_bias"], batch.length)
        return jnp.asarray(encoded), bias, padding_bias(mask)
