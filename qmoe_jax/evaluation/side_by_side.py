"""Two models over the same tokens, layer by layer: no more of either in memory than one layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float32, Float64

from qmoe_jax.config import SwitchConfig
from qmoe_jax.evaluation.loss import Example
from qmoe_jax.evaluation.tensors import Pair, Weights
from qmoe_jax.inference.blockwise.experts import run_experts
from qmoe_jax.inference.blockwise.layers import DecoderLayers, EncoderLayers, Params
from qmoe_jax.inference.blockwise.progress import Watcher
from qmoe_jax.inference.blockwise.states import HiddenStates, plan_batches
from qmoe_jax.parameters import EMBEDDING, STACKS, is_expert

ROWS = 4096
"""Tokens whose cosines are computed at a time: in float64, 70 MB of each model at d_model 2,080."""


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """How far the two models are apart after one layer, over all tokens of its stack but padding.

    Attributes:
      stack: 'encoder' or 'decoder'.
      layer: its number.
      cosine: mean cosine of a token's residual streams after the layer.
      router_agreement: share of tokens that both routers send to the same expert; None in a layer without experts.
    """

    stack: str
    layer: int
    cosine: float
    router_agreement: float | None


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Both models of `pair` over `examples`, computing in `dtype`."""

    pair: Pair
    examples: Sequence[Example]
    dtype: DTypeLike
    experts_per_read: int
    scratch: Path
    watcher: Watcher

    def run(self) -> tuple[list[LayerComparison], list[HiddenStates]]:
        """Run both stacks: how each layer compares, and each decoder's states after the final norm."""
        states = self._embed()
        encoders = [
            EncoderLayers(config, params, mine, plan_batches(mine.lengths), self.dtype)
            for config, params, mine in self._sides("encoder", states["encoder"])
        ]
        layers = [*self._stack("encoder", encoders)]
        decoders = [
            DecoderLayers(config, params, mine, plan_batches(mine.lengths), encoder.states, self.dtype)
            for (config, params, mine), encoder in zip(
                self._sides("decoder", states["decoder"]), encoders, strict=True
            )
        ]
        layers += self._stack("decoder", decoders)
        return layers, states["decoder"]

    def _embed(self) -> dict[str, list[HiddenStates]]:
        """Each model's states before the first layer. The encoder's padding is hidden, as in the models."""
        tables = self.pair.params([EMBEDDING], self.dtype)
        states: dict[str, list[HiddenStates]] = {}
        for side, stack in enumerate(STACKS):
            lengths = [len(example[side]) for example in self.examples]
            ids = np.concatenate([example[side] for example in self.examples])
            visible = ids != self.pair.config.pad_id if stack == "encoder" else None
            for params in tables:
                table = np.asarray(params["token_embedder"]["embedding"])
                mine = HiddenStates(lengths, table.shape[1], self.scratch, visible)
                for start in range(0, len(ids), ROWS):
                    mine.values[start : start + ROWS] = table[ids[start : start + ROWS]]
                states.setdefault(stack, []).append(mine)
        return states

    def _sides(
        self, stack: str, states: Sequence[HiddenStates]
    ) -> Iterator[tuple[SwitchConfig, Params, HiddenStates]]:
        """Each model's architecture, parameters of the stack outside its layers, and states."""
        names = [*self.pair.names(f"{stack}/relpos_bias/"), *self.pair.names(f"{stack}/{stack}_norm/")]
        params = [mine[stack] for mine in self.pair.params(names, self.dtype)]
        return zip(self.pair.configs, params, states, strict=True)

    def _stack(self, stack: str, sides: Sequence[EncoderLayers]) -> Iterator[LayerComparison]:
        """Every layer of a stack and its final norm."""
        for layer in range(self.pair.config.num_layers(stack)):
            self.watcher.layer(stack, layer, sum(side.states.tokens for side in sides))
            yield self._layer(stack, layer, sides)
        for side in sides:
            side.final_norm(f"{stack}_norm")

    def _layer(self, stack: str, layer: int, sides: Sequence[EncoderLayers]) -> LayerComparison:
        key = f"layers_{layer}"
        names = [name for name in self.pair.names(f"{stack}/{key}/") if not is_expert(name)]
        for side, params in zip(sides, self.pair.params(names, self.dtype), strict=True):
            side.params[key] = params[stack][key]
            side.attend(layer)
        if layer in self.pair.config.sparse_layers(stack):
            agreement = self._experts(stack, layer, sides)
        else:
            agreement = None
            for side in sides:
                side.feed_forward(layer)
        for side in sides:
            del side.params[key]
        return LayerComparison(stack, layer, mean_cosine(*(side.states for side in sides)), agreement)

    def _experts(self, stack: str, layer: int, sides: Sequence[EncoderLayers]) -> float:
        """Route, and run the experts range by range; how often the routers agree."""
        routed = [side.route(layer) for side in sides]
        count, size = self.pair.config.num_experts, self.experts_per_read
        with self.pair.staged(size, self.scratch) as pair:
            for start in range(0, count, size):
                experts = range(start, min(start + size, count))
                self._run_range(
                    sides, routed, layer, experts, pair.experts(f"{stack}/layers_{layer}", experts)
                )
                self.watcher.experts(len(experts))
        (original, _), (compressed, _) = routed
        return float(np.mean((original == compressed)[sides[0].states.visible]))

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
                side.add_experts(where, probability[where], run_experts(x, chosen, mine, side.config))


def cosines(
    a: Float32[np.ndarray, "token embed"], b: Float32[np.ndarray, "token embed"]
) -> Float64[np.ndarray, "token"]:
    """Cosine of each pair of rows, in float64: 1 where both are zero, 0 where one is."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    dot = lambda x, y: np.einsum("te,te->t", x, y)
    norms = np.sqrt(dot(a, a) * dot(b, b))
    same = (a == b).all(axis=1)
    return np.where(norms == 0, same, dot(a, b) / np.where(norms == 0, 1.0, norms))


def mean_cosine(a: HiddenStates, b: HiddenStates) -> float:
    """Mean cosine of the states of all visible tokens."""
    total = 0.0
    for start in range(0, a.tokens, ROWS):
        part = slice(start, start + ROWS)
        total += cosines(a.values[part], b.values[part])[a.visible[part]].sum()
    return float(total / a.visible.sum())
