"""A walk over a model, layer by layer, that compresses each layer on the outputs of those before it.

A layer's attention runs as it stands; its router sends the tokens to experts; each expert group is quantized
on its own tokens, and these run on through what it became.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_jax.checkpoints.params import nest, parameter_dtype, to_device
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.resume import GroupStore
from qmoe_jax.compression.tokens import GroupTokens, RoutedTokens, kept_tokens
from qmoe_jax.config import SwitchConfig
from qmoe_jax.data import Examples
from qmoe_jax.inference.blockwise.experts import run_experts
from qmoe_jax.inference.blockwise.layers import DecoderLayers, EncoderLayers, experts_per_layer
from qmoe_jax.inference.blockwise.states import HiddenStates, plan_batches
from qmoe_jax.parameters import EMBEDDING
from qmoe_jax.progress import ProgressCallback, Tally


@dataclasses.dataclass(frozen=True)
class Walk:
    """Every example through the stacks, compressing on the way.

    Attributes:
        model: the architecture.
        dense: the parameters outside the experts, by name, as stored. A layer's are on the device, in
            float32, only while tokens run through it.
        groups: the experts.
        examples: the calibration samples.
        config: the options.
        scratch: folder for hidden states that do not fit in memory.
    """

    model: SwitchConfig
    dense: Mapping[str, np.ndarray]
    groups: GroupStore
    examples: Examples
    config: CompressionConfig
    scratch: Path

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks to run: the decoder only where it is compressed, for nothing comes after it."""
        return ("encoder", "decoder") if "decoder" in self.config.compressed_stacks else ("encoder",)

    def run(self, progress: ProgressCallback) -> None:
        """Run and compress the stacks, the decoder on the outputs of the compressed encoder."""
        tally = Tally(progress, sum(sum(experts_per_layer(self.model, stack)) for stack in self.stacks))
        states = self._embed(0)
        encoder = EncoderLayers(
            self.model, self._params("encoder/relpos_bias/", "encoder/encoder_norm/"), states,
            plan_batches(states.lengths), path=self.groups.reader.path,
        )  # fmt: skip
        self._run_stack("encoder", encoder, tally)
        if "decoder" in self.stacks:
            encoder.final_norm()
            states = self._embed(1)
            decoder = DecoderLayers(
                self.model, self._params("decoder/relpos_bias/"), states,
                plan_batches(states.lengths), encoder.states, path=self.groups.reader.path,
            )  # fmt: skip
            self._run_stack("decoder", decoder, tally)

    def _embed(self, side: int) -> HiddenStates:
        """Return the embedded tokens of the encoder (`side` 0) or decoder (1)."""
        lengths = [len(example[side]) for example in self.examples]
        states = HiddenStates(lengths, self.model.d_model, self.scratch)
        embedding = self.dense[EMBEDDING].astype(np.float32, copy=False)
        states.values[:] = embedding[np.concatenate([example[side] for example in self.examples])]
        return states

    def _params(self, *prefixes: str) -> dict[str, Any]:
        """Load the stack's parameters whose names begin with one of `prefixes` onto the device in float32."""
        names = [name for name in self.dense if name.startswith(prefixes)]
        params = {
            name.partition("/")[2]: to_device(self.dense[name], parameter_dtype(name, np.float32))
            for name in names
        }
        return nest(params)

    def _run_stack(self, stack: str, layers: EncoderLayers, tally: Tally) -> None:
        keep = kept_tokens(self.examples, stack, self.config, self.model)
        for layer, units in enumerate(experts_per_layer(self.model, stack)):
            tally.begin(f"{stack} layer {layer}")
            layers.params |= self._params(f"{stack}/layers_{layer}/")
            layers.attend(layer)
            if layer in self.model.sparse_layers(stack):
                self._run_experts(stack, layer, layers, keep, tally)
            else:
                layers.feed_forward(layer)
                tally.advance(units)
            del layers.params[f"layers_{layer}"]

    def _run_experts(
        self, stack: str, layer: int, layers: EncoderLayers, keep: np.ndarray, tally: Tally
    ) -> None:
        """Route the tokens of a layer and run them through its experts, which are compressed first."""
        count, size = self.model.num_experts, self.config.experts_per_group
        routed = RoutedTokens.select(*layers.route(layer), keep, count, self.config.token_cap)
        for start in range(0, count, size):
            experts = range(start, min(start + size, count))
            where = routed.of_experts(experts)
            tokens = GroupTokens(
                layers.expert_inputs(layer, where), routed.expert[where] - start, routed.calibrates[where]
            )
            if stack in self.config.compressed_stacks:
                weights = self.groups.quantized(stack, layer, experts, tokens)
            else:
                weights = self.groups.original(stack, layer, experts)
            if len(where):
                outputs = run_experts(tokens.x, tokens.expert, weights, self.model)
                layers.add_experts(layer, where, routed.probability[where], outputs)
            tally.advance(len(experts))
