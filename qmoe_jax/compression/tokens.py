"""Selection of the tokens that calibrate experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.config import SwitchConfig
from qmoe_jax.data import Examples
from qmoe_jax.inference.blockwise.experts import token_chunks


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


@dataclasses.dataclass(frozen=True)
class RoutedTokens:
    """The routing of every token of a layer.

    Attributes:
        expert: int32 `[token]`, the expert that each token is sent to.
        probability: float32 `[token]`, the router probability.
        calibrates: bool `[token]`, whether the token enters its expert's Hessian.
    """

    expert: np.ndarray
    probability: np.ndarray
    calibrates: np.ndarray

    @classmethod
    def select(
        cls, expert: np.ndarray, probability: np.ndarray, keep: np.ndarray, num_experts: int, token_cap: float
    ) -> RoutedTokens:
        """Select the tokens to `keep` among the first `token_cap` even shares that each expert receives."""
        cap = int(token_cap * len(expert) / num_experts)
        order = np.argsort(expert, kind="stable")
        counts = np.bincount(expert, minlength=num_experts)
        rank = np.empty(len(expert), np.int64)
        rank[order] = np.arange(len(expert)) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(expert, probability, keep & (rank < cap))

    def of_experts(self, experts: range) -> np.ndarray:
        """Return the numbers of the tokens that are routed to `experts`, in token order."""
        return np.flatnonzero((self.expert >= experts.start) & (self.expert < experts.stop))


@dataclasses.dataclass(frozen=True)
class GroupTokens:
    """The tokens of an expert group.

    Attributes:
        x: float32 `[token, d_model]`, the normed hidden states that experts read.
        expert: int `[token]`, counted from the group's first expert.
        calibrates: bool `[token]`, whether the token enters its expert's Hessian.
    """

    x: np.ndarray
    expert: np.ndarray
    calibrates: np.ndarray

    def calibration(self) -> GroupTokens:
        """Return only the tokens that calibrate."""
        chosen = self.calibrates
        return GroupTokens(self.x[chosen], self.expert[chosen], chosen[chosen])

    def counts(self, num_experts: int) -> tuple[int, ...]:
        """Return the number of tokens of each of the group's experts."""
        return tuple(np.bincount(self.expert, minlength=num_experts).tolist())

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `x` and `expert` in parts of one shape, so that a step compiles once.

        The last part is padded with tokens of no expert (-1).
        """
        for part, pad in token_chunks(len(self.expert)):
            yield (
                np.pad(self.x[part], ((0, pad), (0, 0))),
                np.pad(self.expert[part], (0, pad), constant_values=-1),
            )
