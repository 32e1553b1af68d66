"""Selection of the tokens that calibrate experts."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64, UInt16

from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.tokens.slabs import TokenOrder
from qmoe_jax.config import SwitchConfig
from qmoe_jax.data import Examples

BLOCK = 1 << 20
"""Tokens whose ranks are counted at a time."""


def keep_encoder(tokens: np.ndarray, first_sentinel: int) -> np.ndarray:
    """Return the mask, bool `[token]`, of encoder tokens that are not sentinels."""
    return tokens < first_sentinel


def keep_decoder(tokens: np.ndarray, first_sentinel: int) -> np.ndarray:
    """Return the mask, bool `[token]`, of decoder tokens that predict a token other than a sentinel.

    The last token predicts nothing: it is False.
    """
    return np.append(tokens[1:] < first_sentinel, False)


def kept_tokens(examples: Examples, stack: str, config: CompressionConfig, model: SwitchConfig) -> np.ndarray:
    """Return the mask, bool over all tokens of a stack in order of examples, of those that may calibrate."""
    if config.keep_sentinels:
        return np.ones(sum(len(example[stack == "decoder"]) for example in examples), bool)
    first = config.first_sentinel(model)
    if stack == "encoder":
        return np.concatenate([keep_encoder(encoder, first) for encoder, _ in examples])
    return np.concatenate([keep_decoder(decoder, first) for _, decoder in examples])


def calibrating(
    expert: Int[np.ndarray, "token"], keep: Bool[np.ndarray, "token"], num_experts: int, token_cap: float
) -> Bool[np.ndarray, "token"]:
    """Return which of the tokens to `keep` are among the first `token_cap` even shares of their expert.

    Memory: a mask, and a few numbers for each of `BLOCK` tokens.
    """
    cap = int(token_cap * len(expert) / num_experts)
    seen = np.zeros(num_experts, np.int64)
    chosen = np.empty(len(expert), bool)
    for start in range(0, len(expert), BLOCK):
        part = slice(start, start + BLOCK)
        mine = expert[part]
        order = np.argsort(mine, kind="stable")
        counts = np.bincount(mine, minlength=num_experts)
        rank = np.empty(len(mine), np.int64)
        rank[order] = np.arange(len(mine)) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen[part] = keep[part] & (rank + seen[mine] < cap)
        seen += counts
    return chosen


@dataclasses.dataclass(frozen=True)
class Routing:
    """The routing of every token of a layer, in the stack's order. Memory: 7 bytes per token.

    Attributes:
        expert: the expert that each token is sent to.
        probability: the router probability.
        calibrates: whether the token enters its expert's Hessian.
    """

    expert: UInt16[np.ndarray, "token"]
    probability: Float32[np.ndarray, "token"]
    calibrates: Bool[np.ndarray, "token"]

    @classmethod
    def select(
        cls,
        order: TokenOrder,
        expert: UInt16[np.ndarray, "token"],
        probability: Float32[np.ndarray, "token"],
        keep: Bool[np.ndarray, "token"],
        num_experts: int,
        token_cap: float,
    ) -> Routing:
        """Select the tokens that calibrate, as upstream does in the order of the examples.

        Args:
            order: the stack's order.
            expert: the expert of each token, in the stack's order.
            probability: its router probability.
            keep: which tokens may calibrate, counted example after example.
            num_experts: number of experts.
            token_cap: in even shares.
        """
        by_example = np.empty_like(expert)
        for slab in order.slabs:
            by_example[order.numbers(slab)] = expert[slab.start : slab.stop]
        chosen = calibrating(by_example, keep, num_experts, token_cap)
        calibrates = np.empty(len(expert), bool)
        for slab in order.slabs:
            calibrates[slab.start : slab.stop] = chosen[order.numbers(slab)]
        return cls(expert, probability, calibrates)

    def of_group(self, experts: range) -> GroupTokens:
        """Return the tokens of a range of experts."""
        where = np.flatnonzero((self.expert >= experts.start) & (self.expert < experts.stop))
        expert = self.expert[where].astype(np.int32) - np.int32(experts.start)
        return GroupTokens(where, expert, self.probability[where], self.calibrates[where], len(experts))


@dataclasses.dataclass(frozen=True)
class GroupTokens:
    """The tokens of an expert group in the stack's order.

    Attributes:
        numbers: their numbers in the stack's order.
        expert: counted from the group's first expert.
        probability: the router probability.
        calibrates: whether the token enters its expert's Hessian.
        num_experts: experts of the group.
    """

    numbers: Int64[np.ndarray, "token"]
    expert: Int32[np.ndarray, "token"]
    probability: Float32[np.ndarray, "token"]
    calibrates: Bool[np.ndarray, "token"]
    num_experts: int

    @property
    def routed(self) -> tuple[int, ...]:
        """Number of tokens of each expert."""
        return tuple(np.bincount(self.expert, minlength=self.num_experts).tolist())

    @property
    def calibration(self) -> tuple[int, ...]:
        """Number of calibrating tokens of each expert."""
        return tuple(np.bincount(self.expert[self.calibrates], minlength=self.num_experts).tolist())
