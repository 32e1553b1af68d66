"""Tokenizers: a sentencepiece model with T5's sentinels, found beside a checkpoint."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Iterable

import numpy as np
import sentencepiece
from jaxtyping import Int32

from qmoe_jax.data.errors import TextError
from qmoe_jax.data.span_corruption import EOS, Sentinels
from qmoe_jax.files.foreign import foreign_error
from qmoe_jax.files.location import local_path

TOKENIZER_FILES = ("tokenizer.model", "spiece.model")
"""Names of a sentencepiece model beside a checkpoint: ours and T5's, Hugging Face's."""

PADDING = 128
"""Models pad their vocabulary to a multiple of this; a wider gap to the tokenizer's is worth a warning."""


def find_tokenizer(checkpoint: str | os.PathLike[str]) -> pathlib.Path | None:
    """Return the sentencepiece model that belongs to a local checkpoint, or None.

    It is looked for in the checkpoint's directory and, as T5X lays its files out, in the one above.
    """
    folder = local_path(checkpoint)
    if folder is None or not folder.exists():
        return None
    folder = folder if folder.is_dir() else folder.parent
    candidates = (place / name for place in (folder, folder.resolve().parent) for name in TOKENIZER_FILES)
    return next((path for path in candidates if path.is_file()), None)


class Tokenizer:
    """A sentencepiece model with T5's sentinel ids appended above its pieces.

    Attributes:
        path: the model's file.
        model: the sentencepiece processor, whose ids have no sentinels.
        sentinels: ids of the sentinels, `extra_ids` of them (T5: 32,000 pieces + 100; models pad their
            embedding to 32,128 rows).
    """

    def __init__(self, path: str | os.PathLike[str], extra_ids: int = 100):
        """Read a sentencepiece model: the file `path`, or the one that belongs to the checkpoint at `path`.

        Raises:
            TextError: the file does not exist, or is not a sentencepiece model.
        """
        found = pathlib.Path(path)
        if not found.is_file():
            beside = find_tokenizer(found) if found.is_dir() else None
            if beside is None:
                raise TextError(
                    f"{found}: no sentencepiece model there; expected a file, or "
                    f"{' or '.join(TOKENIZER_FILES)} in this directory or the one above"
                )
            found = beside
        self.path = found
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(found))
        except RuntimeError as error:  # sentencepiece's only kind of error
            if known := foreign_error(found):
                raise TextError(str(known)) from error
            raise TextError(f"{found}: expected a sentencepiece model; {error}") from error
        start = self.model.get_piece_size()
        self.sentinels = Sentinels(start, start + extra_ids - 1)

    @property
    def vocab_size(self) -> int:
        """Number of pieces and sentinels together."""
        return self.sentinels.last + 1

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that the tokenizer can be that of a model with `vocab_size` ids.

        Warns:
            UserWarning: the model has many more ids than the tokenizer, beyond its padding.

        Raises:
            TextError: the tokenizer has more ids than the model.
        """
        ids = f"{self.vocab_size} ({self.sentinels.start} pieces and {self.sentinels.count} sentinels)"
        if self.vocab_size > vocab_size:
            raise TextError(
                f"{self.path}: expected at most {vocab_size} ids, the model's vocabulary, found {ids}; pass "
                "the tokenizer that the model was trained with, or its number of sentinels (extra_ids)"
            )
        if vocab_size - self.vocab_size >= PADDING:
            warnings.warn(
                f"{self.path}: {ids} ids, the model has {vocab_size}; check that it was trained with them",
                stacklevel=2,
            )

    def encode(self, text: str) -> Int32[np.ndarray, "token"]:
        """Return the ids of `text`, without the end token."""
        return np.array(self.model.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, up to the end token.

        Sentinel i is written `<extra_id_i>`. Padding, and ids beyond the sentinels, which a padded vocabulary
        has, are left out.
        """
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if token == EOS:
                break
            if self.sentinels.start <= token <= self.sentinels.last:
                parts += [self.model.decode(run), f"<extra_id_{self.sentinels.last - token}>"]
                run = []
            elif 0 < token < self.sentinels.start:
                run.append(token)
        return " ".join(part for part in [*parts, self.model.decode(run)] if part)
