"""Texts with blanks: encoding them with sentinels, and putting the spans that a model writes into the blanks.

A blank is written `<extra_id_7>`, with the number of its sentinel, or `___` (three underscores or more),
which takes the next number that the text does not name itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Int32

from qmoe_jax.data.tokenizer import Tokenizer

BLANK = re.compile(r"<extra_id_([0-9]+)>|_{3,}")
WORD_START = "▁"
"""The mark that sentencepiece writes for the space before a word."""


@dataclasses.dataclass(frozen=True)
class Infill:
    """A text cut at its blanks: `texts[i]` precedes blank i, the last one follows the last blank.

    Attributes:
        texts: one more than there are blanks; each may be empty.
        marks: each blank as it was written.
        numbers: number of each blank's sentinel; a number that occurs twice asks for the same words twice.
    """

    texts: tuple[str, ...]
    marks: tuple[str, ...]
    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Infill:
        """Find the blanks of a text.

        Raises:
            ValueError: the text has no blank, or is not a string of Unicode characters.
        """
        if not isinstance(text, str):
            raise ValueError(f"expected a text, found {type(text).__name__} {text!r}")
        if lone := re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"expected Unicode text, found the surrogate U+{ord(lone[0]):04X} at position {lone.start()} "
                f"of {text[:60]!r}"
            )
        blanks = list(BLANK.finditer(text))
        if not blanks:
            raise ValueError(f"no blank in {text[:60]!r}: write ___ or <extra_id_0> where words are missing")
        named = {int(blank[1]) for blank in blanks if blank[1]}
        free = (number for number in itertools.count() if number not in named)
        numbers = tuple(int(blank[1]) if blank[1] else next(free) for blank in blanks)
        starts, ends = (
            [0, *(blank.end() for blank in blanks)],
            [*(blank.start() for blank in blanks), len(text)],
        )
        texts = tuple(text[start:end] for start, end in zip(starts, ends, strict=True))
        return cls(texts, tuple(blank[0] for blank in blanks), numbers)

    def encode(self, tokenizer: Tokenizer) -> Int32[np.ndarray, "token"]:
        """Return encoder ids, end token included.

        Raises:
            ValueError: a blank has a number for which the tokenizer has no sentinel.
        """
        sentinels = tokenizer.sentinels
        if (largest := max(self.numbers)) >= sentinels.count:
            raise ValueError(
                f"<extra_id_{largest}>: expected a number of 0 to {sentinels.count - 1}, the sentinels of "
                f"{tokenizer.path}; write a smaller number, or fewer blanks"
            )
        ids = tokenizer.encode(self.texts[0]).tolist()
        for number, text in zip(self.numbers, self.texts[1:], strict=True):
            ids += [int(sentinels.id(number)), *_encode_after_blank(text, tokenizer)]
        return np.array([*ids, tokenizer.token_ids.eos], np.int32)

    def fill(self, spans: Mapping[int, list[int]], tokenizer: Tokenizer) -> str:
        """Return the text with `spans` (ids by sentinel number) in its blanks; the other blanks stay."""
        filled = self.texts[0]
        for number, mark, text in zip(self.numbers, self.marks, self.texts[1:], strict=True):
            span = spans.get(number)
            filled = _join(filled, span, tokenizer) if span else filled + mark
            filled += text
        return filled


def read_spans(ids: Iterable[int], tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Cut generated ids at their sentinels: return the ids after each sentinel, by its number.

    Left out are all ids before the first sentinel and from the end token on, padding, and ids beyond the
    tokenizer's, which a padded vocabulary has. Where a model repeats a sentinel, its first span counts.
    """
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in map(int, ids):
        if token == tokenizer.token_ids.eos:
            break
        if (number := tokenizer.sentinels.number(token)) is not None:
            current = []
            spans.setdefault(number, current)
        elif tokenizer.is_written(token):
            current.append(token)
    return spans


def _encode_after_blank(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a text that follows a blank.

    Sentencepiece puts a space before every text; where the text begins without one ("___ing", "___, then"),
    the first piece is replaced by the same piece without its space, if the vocabulary has that.
    """
    ids = tokenizer.encode(text).tolist()
    if not ids or text[0].isspace():
        return ids
    model = tokenizer.model
    first = model.id_to_piece(ids[0])
    if first == WORD_START:
        return ids[1:]
    bare = model.piece_to_id(first.removeprefix(WORD_START))
    return [ids[0] if bare == model.unk_id() else bare, *ids[1:]]


def _join(before: str, span: list[int], tokenizer: Tokenizer) -> str:
    """Append the words of a span to a text, after a space if its first piece begins with one.

    The text itself stays as it is: its own spaces stand also before a comma.
    """
    words = tokenizer.model.decode(span)
    if not tokenizer.model.id_to_piece(span[0]).startswith(WORD_START):
        return before + words
    return before + words if not before or before[-1].isspace() else f"{before} {words}"
