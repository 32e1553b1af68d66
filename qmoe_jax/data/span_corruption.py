"""T5's span corruption, with upstream QMoE's masks (Raffel et al. 2019, §3.1.4; QMoE `datautils.py`).

A text is cut into alternating runs of kept and noise tokens. The encoder reads the text with each noise run
replaced by a sentinel; the decoder writes the runs, each after its sentinel. Masks come from NumPy's legacy
generator (`np.random.RandomState`), whose stream is frozen: a seed gives the same mask in every version of
NumPy.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from qmoe_jax.config import TokenIds
from qmoe_jax.data.examples import Example
from qmoe_jax.data.seed import check_seed
from qmoe_jax.data.sentinels import Sentinels


def _random_segmentation(items: int, segments: int, generator: np.random.RandomState) -> np.ndarray:
    """Return the lengths of `segments` non-empty runs that add up to `items`, all splits equally likely."""
    starts = np.arange(items - 1) < segments - 1
    generator.shuffle(starts)
    return np.bincount(np.concatenate([[0], np.cumsum(starts)]), minlength=segments)


def noise_mask(
    length: int, generator: np.random.RandomState, density: float = 0.15, mean_span: float = 3.0
) -> Bool[np.ndarray, "token"]:
    """Draw which of `length` tokens are noise; the first is kept, the last is noise.

    Args:
        length: tokens of the text, end token included.
        generator: source of randomness; it is advanced.
        density: share of noise tokens.
        mean_span: mean length of a run of noise.

    Raises:
        ValueError: the text has fewer than 2 tokens, so that none could be kept beside the noise.
    """
    if length < 2:
        raise ValueError(f"expected a text of at least 2 tokens, end token included, found {length}")
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), length - noise)
    noise_runs = _random_segmentation(noise, spans, generator)  # first, as upstream draws them
    kept_runs = _random_segmentation(length - noise, spans, generator)
    runs = np.stack([kept_runs, noise_runs], 1).reshape(-1)
    return np.repeat(np.tile([False, True], spans), runs)


def corrupt(tokens: np.ndarray, mask: np.ndarray, sentinels: Sentinels, token_ids: TokenIds) -> Example:
    """Replace each run of `mask` in `tokens` by a sentinel.

    Args:
        tokens: int `[token]`, end token included.
        mask: bool `[token]`, as `noise_mask` draws it.
        sentinels: ids of the sentinels; one more than there are runs is used.
        token_ids: the model's end and start tokens.

    Raises:
        ValueError: there are more runs than sentinels.
    """
    first = mask & ~np.concatenate([[False], mask[:-1]])
    spans = int(first.sum())
    if spans + 1 > sentinels.count:
        raise ValueError(
            f"{spans} noise spans: expected at least {spans + 1} sentinels in the tokenizer, found "
            f"{sentinels.count}; pass the tokenizer that the model was trained with, or shorter texts"
        )
    marked = np.where(first, sentinels.id(np.cumsum(first) - 1), tokens)
    encoder = np.append(marked[~mask | first], token_ids.eos)
    # Shape: each span's start yields two decoder tokens, its sentinel and the token itself.
    decoder = np.repeat(tokens[mask], 1 + first[mask])
    decoder[np.flatnonzero(first[mask]) + np.arange(spans)] = sentinels.id(np.arange(spans))
    decoder = np.concatenate([[token_ids.decoder_start], decoder, [sentinels.id(spans)]])
    return Example(encoder.astype(np.int32), decoder.astype(np.int32))


def span_corruption(
    texts: list[np.ndarray],
    sentinels: Sentinels,
    token_ids: TokenIds,
    seed: int = 0,
    density: float = 0.15,
    mean_span: float = 3.0,
) -> list[Example]:
    """Corrupt tokenized `texts` (int `[token]`, without the end token) in order, from one generator.

    Upstream seeds with 0 before the training texts and again before the validation texts, as one call for
    each does.
    """
    generator = np.random.RandomState(check_seed(seed))
    examples = []
    for text in texts:
        tokens = np.append(text, token_ids.eos)
        mask = noise_mask(len(tokens), generator, density, mean_span)
        examples.append(corrupt(tokens, mask, sentinels, token_ids))
    return examples
