"""Which tokens calibrate which expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.config import SwitchConfig

Example = tuple[np.ndarray, np.ndarray]


def keep_encoder(tokens: np.ndarray, first_sentinel: int) -> np.ndarray:
    """Bool: the tokens that are not sentinels."""
    return tokens < first_sentinel


def keep_decoder(tokens: np.ndarray, first_sentinel: int) -> np.ndarray:
    """Bool: the tokens that do not predict a sentinel; the last predicts nothing."""
    return np.append(tokens[1:] < first_sentinel, False)


def kept_tokens(
    examples: Sequence[Example], stack: str, config: CompressionConfig, model: SwitchConfig
) -> np.ndarray:
    """Bool over all tokens of a stack, example after example: those that may enter a Hessian."""
    if config.keep_sentinels:
        return np.ones(sum(len(example[stack == "decoder"]) for example in examples), bool)
    first = config.first_sentinel(model)
    if stack == "encoder":
        return np.concatenate([keep_encoder(encoder, first) for encoder, _ in examples])
    return np.concatenate([keep_decoder(decoder, first) for _, decoder in examples])


@dataclasses.dataclass(frozen=True)
class RoutedTokens:
    """Where every token of a layer goes: `expert` int32 and `probability` float32, both `[token]`."""

    expert: np.ndarray
    probability: np.ndarray
    calibrates: np.ndarray

    @classmethod
    def select(
        cls, expert: np.ndarray, probability: np.ndarray, keep: np.ndarray, num_experts: int, token_cap: float
    ) -> RoutedTokens:
        """Of each expert's tokens the first `token_cap` even shares, and of these the ones to `keep`, calibrate it."""
        cap = int(token_cap * len(expert) / num_experts)
        order = np.argsort(expert, kind="stable")
        counts = np.bincount(expert, minlength=num_experts)
        rank = np.empty(len(expert), np.int64)
        rank[order] = np.arange(len(expert)) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(expert, probability, keep & (rank < cap))

    def of_experts(self, start: int, stop: int) -> np.ndarray:
        """Numbers of the tokens routed to experts `start` to `stop - 1`, in token order."""
        return np.flatnonzero((self.expert >= start) & (self.expert < stop))
