"""T5's span corruption, bit for bit as upstream QMoE draws it (Raffel et al. 2019, §3.1.4; QMoE `datautils.py`).

A text is cut into alternating runs of kept and noise tokens. The encoder reads the text with each noise run replaced
by a sentinel; the decoder writes the runs, each after its sentinel. Masks come from NumPy's legacy generator
(`np.random.RandomState`), whose stream is frozen: a seed gives the same mask in every version.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qmoe_jax.data.examples import Example

EOS = 1
DECODER_START = 0


@dataclasses.dataclass(frozen=True)
class Sentinels:
    """The sentinel ids, counted downwards: sentinel i is `last - i`, and none is below `start`."""

    start: int
    last: int

    @property
    def count(self) -> int:
        """How many sentinels there are."""
        return self.last - self.start + 1

    def id(self, index: np.ndarray | int) -> np.ndarray | int:
        """The id of sentinel number `index`."""
        return self.last - index


def _random_segmentation(items: int, segments: int, generator: np.random.RandomState) -> np.ndarray:
    """Lengths of `segments` non-empty runs that add up to `items`, all splits equally likely."""
    starts = np.arange(items - 1) < segments - 1
    generator.shuffle(starts)
    return np.bincount(np.concatenate([[0], np.cumsum(starts)]), minlength=segments)


def noise_mask(
    length: int, generator: np.random.RandomState, density: float = 0.15, mean_span: float = 3.0
) -> np.ndarray:
    """Draw which of `length` tokens are noise: bool `[length]`, beginning with a kept token, ending with noise.

    Raises:
        ValueError: a text of fewer than 2 tokens has nothing to keep beside its noise.
    """
    if length < 2:
        raise ValueError(f"span corruption needs at least 2 tokens, the end token counted; found {length}")
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), length - noise)
    noise_runs = _random_segmentation(noise, spans, generator)  # first, as upstream draws them
    kept_runs = _random_segmentation(length - noise, spans, generator)
    runs = np.stack([kept_runs, noise_runs], 1).reshape(-1)
    return np.repeat(np.tile([False, True], spans), runs)


def corrupt(tokens: np.ndarray, mask: np.ndarray, sentinels: Sentinels) -> Example:
    """Replace each run of `mask` in `tokens` (end token included) by a sentinel.

    Raises:
        ValueError: there are more runs than sentinels.
    """
    first = mask & ~np.concatenate([[False], mask[:-1]])
    spans = int(first.sum())
    if spans + 1 > sentinels.count:
        raise ValueError(
            f"{spans} noise spans need {spans + 1} sentinels; the vocabulary has {sentinels.count}"
        )
    marked = np.where(first, sentinels.id(np.cumsum(first) - 1), tokens)
    encoder = np.append(marked[~mask | first], EOS)
    # Shape: each span's start yields two decoder tokens, its sentinel and the token itself.
    decoder = np.repeat(tokens[mask], 1 + first[mask])
    decoder[np.flatnonzero(first[mask]) + np.arange(spans)] = sentinels.id(np.arange(spans))
    decoder = np.concatenate([[DECODER_START], decoder, [sentinels.id(spans)]])
    return Example(encoder.astype(np.int32), decoder.astype(np.int32))


def span_corruption(
    texts: list[np.ndarray],
    sentinels: Sentinels,
    seed: int = 0,
    density: float = 0.15,
    mean_span: float = 3.0,
) -> list[Example]:
    """Corrupt tokenized `texts` (int `[token]`, without the end token) in order, from one generator.

    Upstream reseeds with 0 for the training texts and again for the validation texts: one call each does that.
    """
    generator = np.random.RandomState(seed)
    examples = []
    for text in texts:
        tokens = np.append(text, EOS)
        examples.append(corrupt(tokens, noise_mask(len(tokens), generator, density, mean_span), sentinels))
    return examples
