"""Samples from text files: documents chosen by length or cut into segments, tokenized and span-corrupted."""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from qmoe_jax.data.errors import TextError
from qmoe_jax.data.examples import Example
from qmoe_jax.data.seed import check_seed
from qmoe_jax.data.span_corruption import span_corruption
from qmoe_jax.data.text import read_documents
from qmoe_jax.data.text_files import check_pipes, text_files
from qmoe_jax.data.tokenizer import Tokenizer

UPSTREAM_MAX_TOKENS = 568
"""Upstream QMoE's limit for C4: 512 encoder tokens once spans are replaced by sentinels."""

PathLike = str | os.PathLike[str]
Tokens = Int32[np.ndarray, "token"]


def samples(
    files: PathLike | Sequence[PathLike],
    tokenizer: Tokenizer,
    count: int | None = None,
    *,
    at_most: int | None = None,
    max_tokens: int | None = None,
    segment: int | None = None,
    split: str | None = None,
    seed: int = 0,
) -> list[Example]:
    """Return span-corrupted samples of text files: short documents as they are, or segments of all documents.

    Args:
        files: text files, folders of them, or `-` for standard input (`read_documents`).
        tokenizer: the model's tokenizer.
        count: number of samples. Of documents the first are taken, of segments every n-th, so that they are
            spread over all documents.
        at_most: in place of `count`: this many, or all where there are fewer. With neither, all.
        max_tokens: skip documents of this many tokens or more; 568 by default, as upstream QMoE does for C4.
        segment: instead of skipping long documents, cut every document into segments of this many tokens.
        split: only JSON lines whose "split" field equals this.
        seed: seed of the masks.

    Memory: the token ids of the samples; of segments, up to four times those.

    Raises:
        TextError: a file cannot be read, or has no text of that length, or fewer than `count`.
        ValueError: an option is out of range, or two exclude each other.
    """
    _check_options(count=count, at_most=at_most, max_tokens=max_tokens, segment=segment)
    seed = check_seed(seed)
    paths = [files] if isinstance(files, str | os.PathLike) else list(files)
    check_pipes(*map(text_files, paths))  # refuses a path before those in front of it are read
    documents = _Counted(text for path in paths for text in read_documents(path, split))
    wanted = count or at_most
    if segment:
        texts = spread(segments(documents, tokenizer, segment), wanted)
        rule = f"of at least {-(-segment // 2)} tokens, half a segment"
        advice = "or cut shorter segments"
    else:
        limit = max_tokens or UPSTREAM_MAX_TOKENS
        texts = short_texts(documents, tokenizer, limit, wanted)
        rule = f"of fewer than {limit} tokens"
        advice = "or cut longer texts into segments (option segment)"
    if len(texts) < (count or 1):
        of_split = f' with "split": "{split}"' if split else ""
        raise TextError(
            f"fewer samples than asked for{of_split}" if texts else f"no text{of_split} {rule}",
            path=", ".join(map(str, paths)),
            expected=f"{count or 'at least 1'} {rule}",
            found=f"{len(texts)} in {documents.read} documents",
            remedy=f"add text, {advice}" + (f", or ask for at most {len(texts)} samples" if texts else ""),
        )
    return span_corruption(texts, tokenizer.sentinels, tokenizer.token_ids, seed)


def _check_options(**options: int | None) -> None:
    """Check numbers and that no two options exclude each other. Raises `ValueError`."""
    least = {"count": 1, "at_most": 1, "max_tokens": 2, "segment": 2}
    for name, value in options.items():
        if value is None:
            continue
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or operator.index(value) < least[name]:
            raise ValueError(f"{name}: expected an integer of at least {least[name]}, found {value!r}")
    if options["max_tokens"] and options["segment"]:
        raise ValueError(
            "expected max_tokens, which skips long texts, or segment, which cuts them, found both"
        )
    if options["count"] and options["at_most"]:
        raise ValueError("expected count, the number of samples, or at_most, a limit of it, found both")


class _Counted:
    """Documents, and how many were read."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.read, self._documents = 0, documents

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            self.read += 1
            yield document


def segments(documents: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[Tokens]:
    """Cut every document into segments of `length` tokens; a rest shorter than half of it is left out."""
    for document in documents:
        tokens = tokenizer.encode(document)
        for start in range(0, len(tokens), length):
            segment = tokens[start : start + length]
            if 2 * len(segment) >= length:
                yield segment


def short_texts(
    documents: Iterable[str], tokenizer: Tokenizer, limit: int, count: int | None = None
) -> list[Tokens]:
    """Return the first `count` documents of at most `limit` tokens, end token included, skipping others.

    Upstream's rule for C4, with `limit` 568: 512 encoder tokens once spans are replaced by sentinels.
    """
    encoded = (tokenizer.encode(document) for document in documents)
    return list(itertools.islice((tokens for tokens in encoded if 1 <= len(tokens) < limit), count))


def spread(texts: Iterable[Tokens], count: int | None) -> list[Tokens]:
    """Return `count` texts at even distances, the first among them; all where there are fewer, or for None.

    Memory: at most 4 * `count` texts. Beyond as many, every second is kept, then every fourth, and so on.
    """
    if count is None:
        return list(texts)
    kept: list[Tokens] = []
    stride = 1
    for number, text in enumerate(texts):
        if number % stride == 0:
            kept.append(text)
            if len(kept) > 4 * count:
                kept, stride = kept[::2], 2 * stride
    count = min(count, len(kept))
    return [kept[-(-i * len(kept) // count)] for i in range(count)]
