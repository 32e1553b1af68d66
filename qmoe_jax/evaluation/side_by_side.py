"""Two models over the same tokens, layer by layer, with one layer of each in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float32, Float64

from qmoe_jax.config import SwitchConfig
from qmoe_jax.data import Examples
from qmoe_jax.evaluation.tensors import Pair, Weights
from qmoe_jax.inference.blockwise.experts import run_experts
from qmoe_jax.inference.blockwise.layers import DecoderLayers, EncoderLayers, Params, experts_per_layer
from qmoe_jax.inference.blockwise.states import HiddenStates, plan_batches
from qmoe_jax.parameters import EMBEDDING, STACKS, is_expert
from qmoe_jax.progress import ProgressCallback, Tally

ROWS = 4096
"""Tokens whose cosines are computed at a time: in float64, 70 MB per model at d_model 2,080."""


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """Distance of the two models after one layer, over all tokens of its stack but padding.

    Attributes:
        stack: "encoder" or "decoder".
        layer: number of the layer within its stack.
        cosine: mean cosine between a token's residual streams after the layer.
        router_agreement: share of tokens that both routers send to the same expert; None in a dense layer.
    """

    stack: str
    layer: int
    cosine: float
    router_agreement: float | None


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Both models of a pair over the same examples.

    Attributes:
        pair: the models.
        examples: the samples.
        dtype: dtype of the computation.
        experts_per_read: experts of a layer in memory together.
        scratch: folder for what does not fit in memory.
    """

    pair: Pair
    examples: Examples
    dtype: DTypeLike
    experts_per_read: int
    scratch: Path

    def run(self, progress: ProgressCallback) -> tuple[list[LayerComparison], list[HiddenStates]]:
        """Run both stacks; return each layer's comparison and each decoder's states after its final norm."""
        tally = Tally(progress, sum(sum(experts_per_layer(self.pair.config, stack)) for stack in STACKS))
        states = self._embed()
        encoders = [
            EncoderLayers(config, params, mine, plan_batches(mine.lengths), self.dtype, path=path)
            for path, config, params, mine in self._sides("encoder", states["encoder"])
        ]
        layers = [*self._stack("encoder", encoders, tally)]
        decoders = [
            DecoderLayers(
                config, params, mine, plan_batches(mine.lengths), encoder.states, self.dtype, path=path
            )
            for (path, config, params, mine), encoder in zip(
                self._sides("decoder", states["decoder"]), encoders, strict=True
            )
        ]
        layers += self._stack("decoder", decoders, tally)
        return layers, states["decoder"]

    def _embed(self) -> dict[str, list[HiddenStates]]:
        """Return each model's states before the first layer."""
        tables = self.pair.params([EMBEDDING], self.dtype)
        states: dict[str, list[HiddenStates]] = {}
        for side, stack in enumerate(STACKS):
            lengths = [len(example[side]) for example in self.examples]
            ids = np.concatenate([example[side] for example in self.examples])
            for params in tables:
                table = np.asarray(params["token_embedder"]["embedding"])
                mine = HiddenStates(lengths, table.shape[1], self.scratch)
                for start in range(0, len(ids), ROWS):
                    mine.values[start : start + ROWS] = table[ids[start : start + ROWS]]
                states.setdefault(stack, []).append(mine)
        return states

    def _sides(
        self, stack: str, states: Sequence[HiddenStates]
    ) -> Iterator[tuple[Path | str, SwitchConfig, Params, HiddenStates]]:
        """Return each model's path, architecture, parameters of the stack outside its layers, and states."""
        names = [*self.pair.names(f"{stack}/relpos_bias/"), *self.pair.names(f"{stack}/{stack}_norm/")]
        params = [mine[stack] for mine in self.pair.params(names, self.dtype)]
        return zip(self.pair.paths, self.pair.configs, params, states, strict=True)

    def _stack(self, stack: str, sides: Sequence[EncoderLayers], tally: Tally) -> Iterator[LayerComparison]:
        """Run every layer of a stack and its final norm."""
        for layer in range(self.pair.config.num_layers(stack)):
            tally.begin(f"{stack} layer {layer}")
            yield self._layer(stack, layer, sides, tally)
        for side in sides:
            side.final_norm(f"{stack}_norm")

    def _layer(self, stack: str, layer: int, sides: Sequence[EncoderLayers], tally: Tally) -> LayerComparison:
        key = f"layers_{layer}"
        names = [name for name in self.pair.names(f"{stack}/{key}/") if not is_expert(name)]
        for side, params in zip(sides, self.pair.params(names, self.dtype), strict=True):
            side.params[key] = params[stack][key]
            side.attend(layer)
        if layer in self.pair.config.sparse_layers(stack):
            agreement = self._experts(stack, layer, sides, tally)
        else:
            agreement = None
            for side in sides:
                side.feed_forward(layer)
            tally.advance(1)
        for side in sides:
            del side.params[key]
        return LayerComparison(stack, layer, mean_cosine(*(side.states for side in sides)), agreement)

    def _experts(self, stack: str, layer: int, sides: Sequence[EncoderLayers], tally: Tally) -> float:
        """Route the tokens and run the experts range by range; return how often the routers agree."""
        routed = [side.route(layer) for side in sides]
        count, size = self.pair.config.num_experts, self.experts_per_read
        with self.pair.staged(f"{stack}/layers_{layer}", size, self.scratch) as pair:
            for start in range(0, count, size):
                experts = range(start, min(start + size, count))
                weights = pair.experts(f"{stack}/layers_{layer}", experts)
                self._run_range(sides, routed, layer, experts, weights)
                tally.advance(len(experts))
        (original, _), (compressed, _) = routed
        return float(np.mean(original == compressed))

    def _run_range(
        self,
        sides: Sequence[EncoderLayers],
        routed: Sequence[tuple[np.ndarray, np.ndarray]],
        layer: int,
        experts: range,
        weights: Sequence[Weights],
    ) -> None:
        """Run on each side the tokens that its router sends to `experts`."""
        for side, (expert, probability), mine in zip(sides, routed, weights, strict=True):
            where = np.flatnonzero((expert >= experts.start) & (expert < experts.stop))
            if len(where):
                x, chosen = side.expert_inputs(layer, where), expert[where] - experts.start
                outputs = run_experts(x, chosen, mine, side.config)
                side.add_experts(layer, where, probability[where], outputs)


def cosines(
    a: Float32[np.ndarray, "token embed"], b: Float32[np.ndarray, "token embed"]
) -> Float64[np.ndarray, "token"]:
    """Return the cosine of each pair of rows, in float64: 1 where both are zero, 0 where one is."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    dot = lambda x, y: np.einsum("te,te->t", x, y)
    norms = np.sqrt(dot(a, a) * dot(b, b))
    same = (a == b).all(axis=1)
    return np.where(norms == 0, same, dot(a, b) / np.where(norms == 0, 1.0, norms))


def mean_cosine(a: HiddenStates, b: HiddenStates) -> float:
    """Return the mean cosine of the states of all tokens."""
    total = 0.0
    for start in range(0, a.tokens, ROWS):
        part = slice(start, start + ROWS)
        total += cosines(a.values[part], b.values[part]).sum()
    return float(total / a.tokens)
