"""Samples from text files: documents chosen by length or cut into segments, tokenized and span-corrupted."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from qmoe_jax.data.examples import Example
from qmoe_jax.data.seed import check_seed
from qmoe_jax.data.span_corruption import span_corruption
from qmoe_jax.data.text import TextError, read_documents, text_files
from qmoe_jax.data.tokenizer import Tokenizer

UPSTREAM_MAX_TOKENS = 568
"""Upstream QMoE's limit for C4: 512 encoder tokens once spans are replaced by sentinels."""

PathLike = str | os.PathLike[str]


def samples(
    files: PathLike | Sequence[PathLike],
    tokenizer: Tokenizer,
    count: int | None = None,
    *,
    max_tokens: int | None = None,
    segment: int | None = None,
    split: str | None = None,
    seed: int = 0,
) -> list[Example]:
    """Return span-corrupted samples of text files: short documents as they are, or segments of all documents.

    Args:
        files: text files, or folders of them: .txt or .jsonl, optionally .gz or .xz (`read_documents`).
        tokenizer: the model's tokenizer.
        count: samples at most; by default all. Of documents the first are taken, of segments every n-th, so
            that they are spread over all documents.
        max_tokens: skip documents of this many tokens or more; 568 by default, as upstream QMoE does for C4.
        segment: instead of skipping long documents, cut every document into segments of this many tokens.
        split: only JSON lines whose "split" field equals this.
        seed: seed of the masks.

    Memory: the token ids of the samples; with `segment`, of all documents.

    Raises:
        TextError: a file cannot be read, or no text of that length is found.
        ValueError: both `max_tokens` and `segment` are given.
    """
    if max_tokens and segment:
        raise ValueError(
            "expected max_tokens, which skips long texts, or segment, which cuts them, found both"
        )
    seed = check_seed(seed)  # before the files are read
    paths = [pathlib.Path(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]
    for path in paths:
        text_files(path)  # refuses a path without text before those in front of it are read
    documents = (text for path in paths for text in read_documents(path, split))
    if segment:
        texts = segments(documents, tokenizer, segment)
        texts = texts[:: max(1, -(-len(texts) // (count or len(texts) or 1)))]
        rule = f"of at least {-(-segment // 2)} tokens, half a segment"
    else:
        limit = max_tokens or UPSTREAM_MAX_TOKENS
        texts = short_texts(documents, tokenizer, limit, count)
        rule = f"of fewer than {limit} tokens; cut longer texts into segments (option segment)"
    if not texts:
        of_split = f' with "split": "{split}"' if split else ""
        raise TextError(f"{', '.join(map(str, paths))}: no text{of_split} {rule}")
    return span_corruption(texts, tokenizer.sentinels, seed)


def segments(documents: Iterable[str], tokenizer: Tokenizer, length: int) -> list[Int32[np.ndarray, "token"]]:
    """Cut every document into segments of `length` tokens; a rest shorter than half of it is left out."""
    found = []
    for document in documents:
        tokens = tokenizer.encode(document)
        for start in range(0, len(tokens), length):
            segment = tokens[start : start + length]
            if 2 * len(segment) >= length:
                found.append(segment)
    return found


def short_texts(
    documents: Iterable[str], tokenizer: Tokenizer, limit: int, count: int | None = None
) -> list[Int32[np.ndarray, "token"]]:
    """Return the first `count` documents of at most `limit` tokens, end token included, skipping others.

    Upstream's rule for C4, with `limit` 568: 512 encoder tokens once spans are replaced by sentinels.
    """
    texts: list[np.ndarray] = []
    for document in documents:
        if count is not None and len(texts) == count:
            break
        tokens = tokenizer.encode(document)
        if 1 <= len(tokens) < limit:
            texts.append(tokens)
    return texts
