"""One pass over a stack's hidden states: attention and dense layers, up to the router of a sparse layer.

Slab by slab, the states are read, run through the layers and handed on. The batches of a slab are divided
among the devices of a mesh, each batch whole on one of them.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32

from qmoe_jax.compression.passes.wave import parts_of, place, sound
from qmoe_jax.compression.tokens.slabs import Batch, Slab, TokenOrder
from qmoe_jax.config import SwitchConfig
from qmoe_jax.distributed import split_over
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.blockwise.layers import overflow_error
from qmoe_jax.inference.blockwise.states import row_mask
from qmoe_jax.models.attention import padding_bias
from qmoe_jax.models.layers import RMSNorm
from qmoe_jax.models.switch import Block, Decoder, DecoderBlock, Encoder, EncoderBlock

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class SlabStates:
    """The hidden states of a slab, and those of the encoder that it attends to.

    Attributes:
        slab: the slab.
        x: one after another.
        encoded: the encoder's final states of the same examples, one example after another; None in the
            encoder.
    """

    slab: Slab
    x: Float32[np.ndarray, "token embed"]
    encoded: Float32[np.ndarray, "context embed"] | None


@dataclasses.dataclass(frozen=True)
class RoutedSlab:
    """The result of a pass for one slab.

    Attributes:
        slab: the slab.
        x: the states before the experts of the last layer.
        expert: the expert that each token is sent to; None at the end of a stack.
        probability: the router probability.
    """

    slab: Slab
    x: Float32[np.ndarray, "token embed"]
    expert: np.ndarray | None
    probability: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class AttentionPass:
    """The layers of a pass.

    Attributes:
        model: the architecture.
        stack: "encoder" or "decoder".
        dense: layers without experts, run whole.
        sparse: the layer with experts behind them, run up to its router; None: the stack's final norm.
        params: parameters of the stack, on every device: those of the layers without their experts, the
            position bias and, where it is run, the final norm.
        mesh: the devices.
        order: the stack's order.
        context_lengths: tokens of each example in the encoder, in the decoder's stack.
        path: the checkpoint, for errors.
    """

    model: SwitchConfig
    stack: str
    dense: tuple[int, ...]
    sparse: int | None
    params: Params
    mesh: Mesh
    order: TokenOrder
    context_lengths: np.ndarray | None
    path: object

    def run(self, states: SlabStates) -> RoutedSlab:
        """Run a slab.

        Raises:
            CheckpointError: the model overflows; names layer, part, example and token.
        """
        slab, x = states.slab, states.x
        out = np.empty_like(x)
        experts = np.empty(len(x), np.uint16)
        probabilities = np.empty(len(x), np.float32)
        pending: deque[tuple[list[_Place], dict[str, Array], Array, Any]] = deque()
        for wave in _waves(self._places(slab), self.mesh.size):
            pending.append((wave, *self._launch(wave, states)))
            while len(pending) > 1:
                self._collect(pending.popleft(), slab, out, experts, probabilities)
        while pending:
            self._collect(pending.popleft(), slab, out, experts, probabilities)
        if self.sparse is None:
            return RoutedSlab(slab, out, None, None)
        return RoutedSlab(slab, out, experts, probabilities)

    def _launch(self, wave: list[_Place], states: SlabStates) -> tuple[dict[str, Array], Array, Any]:
        """Start the layers on a wave of batches, one per device; return what they will give."""
        idle = self.mesh.size - len(wave)
        x = _padded(self.mesh, [each.batch.pad(states.x[each.start : each.stop]) for each in wave], idle)
        context = [_padded(self.mesh, [each.batch.mask for each in wave], idle)]
        if states.encoded is not None:
            rows = [self._encoded(each, states.encoded) for each in wave]
            context += [_padded(self.mesh, [part[i] for part in rows], idle) for i in (0, 1)]
        checks: dict[str, Array] = {}
        for layer in (*self.dense, *(() if self.sparse is None else (self.sparse,))):
            params, block = self.params[f"layers_{layer}"], self._block(layer)
            relpos = self.params["relpos_bias"]
            x, fine = _attend(self.mesh, self.model, block, (params, relpos), x, tuple(context))
            checks[f"layer {layer}, attention"] = fine
            if layer != self.sparse:
                x, fine = _feed_forward(self.mesh, block, params, x, context[0])
                checks[f"layer {layer}, feed-forward part"] = fine
        if self.sparse is None:
            scale = self.params[f"{self.stack}_norm"]["scale"]
            x, fine = _final_norm(self.mesh, self.model, scale, x, context[0])
            return checks | {"final norm": fine}, x, None
        block, params = self._block(self.sparse), self.params[f"layers_{self.sparse}"]
        expert, probability, fine = _route(self.mesh, block, params, x, context[0])
        return checks | {f"layer {self.sparse}, router": fine}, x, (expert, probability)

    def _collect(
        self,
        result: tuple[list[_Place], dict[str, Array], Array, Any],
        slab: Slab,
        out: np.ndarray,
        experts: np.ndarray,
        probabilities: np.ndarray,
    ) -> None:
        """Wait for a wave, and put what it gives into the slab's arrays."""
        wave, checks, x, routing = result
        for part, fine in checks.items():
            for each, rows in zip(wave, parts_of(fine), strict=False):
                self._require(np.asarray(rows)[each.batch.mask], slab.start + each.start, part)
        for array, target in ((x, out), *zip(routing or (), (experts, probabilities), strict=False)):
            for each, rows in zip(wave, parts_of(array), strict=False):
                target[each.start : each.stop] = np.asarray(rows)[each.batch.mask]

    def _places(self, slab: Slab) -> Iterator[_Place]:
        """Yield the batches of a slab with the tokens that are theirs."""
        start = context = 0
        for batch in slab.batches:
            yield _Place(batch, start, start + batch.tokens, context)
            start += batch.tokens
            if self.context_lengths is not None:
                context += int(self.context_lengths[batch.examples].sum())

    def _encoded(self, each: _Place, encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the encoder's states of a batch as padded rows, and their mask."""
        assert self.context_lengths is not None
        lengths = self.context_lengths[each.batch.examples]
        mask = row_mask(lengths, each.batch.rows, each.batch.context)
        rows = np.zeros((*mask.shape, encoded.shape[1]), encoded.dtype)
        rows[mask] = encoded[each.context_start : each.context_start + int(lengths.sum())]
        return rows, mask

    def _block(self, layer: int) -> Block:
        kind = EncoderBlock if self.stack == "encoder" else DecoderBlock
        return kind(self.model, layer in self.model.sparse_layers(self.stack), dtype=jnp.float32)

    def _require(self, fine: Bool[np.ndarray, "token"], start: int, part: str) -> None:
        if not fine.all():
            raise self.overflow(part, start + int(fine.argmin()))

    def overflow(self, part: str, token: int) -> CheckpointError:
        """Return the error for a token, counted in the stack's order, whose state is not finite."""
        return overflow_error(np.float32, self.path, self.stack, part, *self.order.place(token))


@dataclasses.dataclass(frozen=True)
class _Place:
    """A batch, the tokens that it has in its slab, and the first of the encoder's tokens there."""

    batch: Batch
    start: int
    stop: int
    context_start: int


def _waves(places: Iterator[_Place], size: int) -> Iterator[list[_Place]]:
    """Yield runs of up to `size` batches of one shape."""
    wave: list[_Place] = []
    for each in places:
        if wave and (len(wave) == size or each.batch.shape != wave[0].batch.shape):
            yield wave
            wave = []
        wave.append(each)
    if wave:
        yield wave


def _padded(mesh: Mesh, parts: Sequence[np.ndarray], idle: int) -> Array:
    """Return arrays, one per device, divided over the mesh; `idle` devices get zeros."""
    return place(mesh, [*parts, *[np.zeros_like(parts[0])] * idle])


@partial(jax.jit, static_argnames=("mesh", "model", "block"))
def _attend(
    mesh: Mesh,
    model: SwitchConfig,
    block: Block,
    params: tuple[Params, Params],
    x: Float[Array, "row token embed"],
    context: tuple[Array, ...],
) -> tuple[Float[Array, "row token embed"], Bool[Array, "row token"]]:
    """Add a layer's attention; `context` is the mask, in the decoder also the encoder's states and mask."""

    def local(replicated: tuple[Params, Params], split: tuple) -> tuple[Array, Array]:
        (params, relpos), (x, mask, *encoded) = replicated, split
        operands: tuple[Array, ...]
        if not encoded:
            bound: Any = Encoder(model, dtype=jnp.float32)
            operands = (bound.apply({"params": {"relpos_bias": relpos}}, mask, method="bias"),)
        else:
            bound = Decoder(model, dtype=jnp.float32)
            bias = bound.apply({"params": {"relpos_bias": relpos}}, x.shape[1], method="bias")
            operands = (encoded[0], bias, padding_bias(encoded[1]))
        y: Any = block.apply({"params": params}, x, *operands, method="attend")
        return y, sound(y) | ~mask

    result: tuple = split_over(mesh, local)(params, (x, *context))
    return result


@partial(jax.jit, static_argnames=("mesh", "block"))
def _feed_forward(
    mesh: Mesh, block: Block, params: Params, x: Array, mask: Array
) -> tuple[Float[Array, "row token embed"], Bool[Array, "row token"]]:
    """Add the feed-forward part of a layer without experts."""

    def local(params: Params, split: tuple) -> tuple[Array, Array]:
        x, mask = split
        y: Any = block.apply({"params": params}, x, method="feed_forward")
        return y, sound(y) | ~mask

    result: tuple = split_over(mesh, local)(params, (x, mask))
    return result


@partial(jax.jit, static_argnames=("mesh", "block"))
def _route(mesh: Mesh, block: Block, params: Params, x: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Return each token's expert, its router probability, and whether that is finite."""

    def local(params: Params, split: tuple) -> tuple[Array, Array, Array]:
        x, mask = split
        _, routing = block.apply({"params": params}, x, method="route")
        return routing.expert, routing.probability, jnp.isfinite(routing.probability) | ~mask

    result: tuple = split_over(mesh, local)(params, (x, mask))
    return result


@partial(jax.jit, static_argnames=("mesh", "model"))
def _final_norm(mesh: Mesh, model: SwitchConfig, scale: Array, x: Array, mask: Array) -> tuple[Array, Array]:
    """Apply the stack's last norm."""

    def local(scale: Array, split: tuple) -> tuple[Array, Array]:
        x, mask = split
        y: Any = RMSNorm(model.layer_norm_epsilon, jnp.float32).apply({"params": {"scale": scale}}, x)
        return y, sound(y) | ~mask

    result: tuple = split_over(mesh, local)(scale, (x, mask))
    return result
