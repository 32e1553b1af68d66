"""Tokenizers: a sentencepiece model with its sentinels, found beside a checkpoint."""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Iterable

import numpy as np
import sentencepiece
from jaxtyping import Int32

from qmoe_jax.config import SwitchConfig, TokenIds
from qmoe_jax.data.errors import TextError
from qmoe_jax.data.sentinels import CONFIG_FILE, TRAINED_WITH, Sentinels, find_sentinels, side_file
from qmoe_jax.files.foreign import foreign_error
from qmoe_jax.files.location import local_path
from qmoe_jax.files.reading import read_whole

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
    """A sentencepiece model with its sentinels, and the ids that texts for a model are made with.

    Attributes:
        path: the model's file.
        model: the sentencepiece processor.
        sentinels: ids of the sentinels (`find_sentinels`): among the file's pieces, or above them (T5: 32,000
            pieces + 100; models pad their embedding to 32,128 rows).
        token_ids: ids of padding, end and start.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        extra_ids: int | None = None,
        token_ids: TokenIds | None = None,
    ):
        """Read a sentencepiece model: the file `path`, or the one that belongs to the checkpoint at `path`.

        Args:
            path: see above.
            extra_ids: number of sentinels; by default what the tokenizer's files say, else T5's 100.
            token_ids: the model's; by default the file's own, and a decoder that starts with padding.

        Raises:
            TextError: the file does not exist, is not a sentencepiece model, or has other sentinels.
            CheckpointError: it cannot be read, or a file beside it is damaged.
        """
        found = pathlib.Path(path)
        if not found.is_file():
            beside = find_tokenizer(found) if found.is_dir() else None
            if beside is None:
                raise TextError(
                    "no sentencepiece model there",
                    path=found,
                    expected=f"a file, or a directory with {' or '.join(TOKENIZER_FILES)} in it or above it",
                    remedy="pass the tokenizer's file",
                )
            found = beside
        self.path = found
        try:
            # By its bytes: sentencepiece takes no path that is not UTF-8.
            self.model = sentencepiece.SentencePieceProcessor(model_proto=read_whole(found))
        except RuntimeError as error:  # sentencepiece's only kind of error
            known = foreign_error(found)
            raise TextError(
                known.problem if known else "is not a sentencepiece model",
                path=found,
                expected="a sentencepiece model",
                found=None if known else error,
                remedy=known.remedy if known else "copy or download the file again",
            ) from error
        self.sentinels: Sentinels = find_sentinels(self.model, found, extra_ids)
        self.token_ids: TokenIds = token_ids or self._own_ids()

    def _own_ids(self) -> TokenIds:
        pad, eos = self.model.pad_id(), self.model.eos_id()
        pad = TokenIds.pad if pad < 0 else pad
        return TokenIds(pad, TokenIds.eos if eos < 0 else eos, decoder_start=pad)

    @property
    def pieces(self) -> int:
        """Number of pieces in the model's file, sentinels among them where it holds them."""
        return self.model.get_piece_size()

    @property
    def vocab_size(self) -> int:
        """Number of ids: pieces and sentinels together."""
        return max(self.pieces, *(token + 1 for token in self.sentinels.ids))

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, from which `Tokenizer` reads the same pieces and sentinels anywhere."""
        files = {TOKENIZER_FILES[0]: self.path.read_bytes()}
        if self.sentinels.start >= self.pieces and self.sentinels != Sentinels.above(self.pieces):
            files[CONFIG_FILE] = json.dumps(side_file(self.sentinels), indent=1).encode() + b"\n"
        return files

    def check_model(self, config: SwitchConfig) -> None:
        """Check that the tokenizer can be that of a model.

        Its own padding and end token must be the model's. A tokenizer without one of them must not have a
        word where the model has it.

        Raises:
            TextError: the tokenizer has more ids than the model, or disagrees about a token's id.
        """
        if self.vocab_size > config.vocab_size:
            raise TextError(
                "has more ids than the model",
                path=self.path,
                expected=f"at most {config.vocab_size}, the model's vocabulary",
                found=self._count(),
                remedy=f"{TRAINED_WITH}. Another number of sentinels (extra_ids) helps only if the model was "
                "trained with that number: any other gives every sentinel a wrong id",
            )
        for key, name, own, theirs in (
            ("pad_token_id", "padding", self.model.pad_id(), config.pad_id),
            ("eos_token_id", "end token", self.model.eos_id(), config.eos_id),
        ):
            if own >= 0 and own != theirs:
                raise TextError(
                    f"has another {name} than the model",
                    path=self.path,
                    key=key,
                    expected=f"{theirs}, the model's",
                    found=f"{own}, the tokenizer's own",
                    remedy=f"{TRAINED_WITH}, or correct {key} in the model's config.json (a T5X checkpoint "
                    "has none: convert it to huggingface first)",
                )
            if own < 0 and self._is_text(theirs):
                raise TextError(
                    f"has text where the model has its {name}",
                    path=self.path,
                    key=key,
                    expected=f"an id without text as {theirs}, the model's",
                    found=f"the piece {self.model.id_to_piece(theirs)!r}",
                    remedy=f"{TRAINED_WITH}, or correct {key} in the model's config.json",
                )

    def warn_of_fewer_ids(self, vocab_size: int) -> None:
        """Warn if a model has many more ids than the tokenizer, beyond its padding."""
        if vocab_size - self.vocab_size >= PADDING:
            warnings.warn(
                f"{self.path}: {self._count()} ids, the model has {vocab_size}; check that it was trained "
                "with them",
                stacklevel=2,
            )

    def encode(self, text: str) -> Int32[np.ndarray, "token"]:
        """Return the ids of `text`, without the end token."""
        return np.array(self.model.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, up to the end token.

        Sentinel i is written `<extra_id_i>`. Padding, and ids beyond the tokenizer's, which a padded
        vocabulary has, are left out.
        """
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if token == self.token_ids.eos:
                break
            if (number := self.sentinels.number(token)) is not None:
                parts += [self.model.decode(run), f"<extra_id_{number}>"]
                run = []
            elif self.is_written(token):
                run.append(token)
        return " ".join(part for part in [*parts, self.model.decode(run)] if part)

    def is_written(self, token: int) -> bool:
        """Return whether a generated id is a piece of text: not padding, nor beyond the tokenizer's ids."""
        return token != self.token_ids.pad and 0 <= token < self.pieces

    def _is_text(self, token: int) -> bool:
        """Return whether an id is that of a sentinel or of a piece with text of its own."""
        if self.sentinels.number(token) is not None:
            return True
        model = self.model
        textless = model.is_control(token) or model.is_unknown(token) or model.is_unused(token)
        return token < self.pieces and not textless

    def _count(self) -> str:
        inside = sum(token < self.pieces for token in self.sentinels.ids)
        return f"{self.vocab_size} ({self.pieces - inside} pieces and {self.sentinels.count} sentinels)"
