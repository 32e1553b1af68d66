"""Text files to documents, documents to token ids."""

from __future__ import annotations

import gzip
import json
import lzma
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece

from qmoe_jax.data.span_corruption import Sentinels

SUFFIXES = (".txt", ".jsonl", ".json")
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


class TextError(ValueError):
    """A text source that cannot be read: the message names the file, what is wrong and what to do."""


def _is_text(path: pathlib.Path) -> bool:
    suffixes = [suffix for suffix in path.suffixes if suffix not in OPENERS]
    return bool(suffixes) and suffixes[-1] in SUFFIXES


def text_files(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The text files at `path`: a file, or a folder searched recursively, in sorted order.

    Raises:
        TextError: nothing readable is there.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and _is_text(p)) if path.is_dir() else []
    if not found:
        raise TextError(f"{path}: no text found; expected .txt or .jsonl files, optionally .gz or .xz")
    return found


def read_documents(path: str | pathlib.Path, split: str | None = None) -> Iterator[str]:
    """Yield the documents at `path`: each JSON line's "text", or the whole of a .txt file.

    With `split`, only JSON lines whose "split" field is that, so that one file may hold several splits.

    Raises:
        TextError: a line is not JSON or has no "text".
    """
    for file in text_files(path):
        try:
            yield from _documents_of(file, split)
        except (lzma.LZMAError, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise TextError(f"{file}: is damaged or no UTF-8 text ({error})") from error


def _documents_of(file: pathlib.Path, split: str | None) -> Iterator[str]:
    with OPENERS.get(file.suffix, open)(file, "rt", encoding="utf-8") as lines:  # type: ignore[operator]
        if ".txt" in file.suffixes:
            yield lines.read()
            return
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                text = row["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise TextError(
                    f'{file}, line {number}: expected a JSON object with "text", found {line[:60]!r}'
                ) from error
            if split is None or row.get("split") == split:
                yield text


class Tokenizer:
    """A sentencepiece model with T5's sentinel ids appended above its pieces.

    `vocab_size` is pieces + `extra_ids` (T5: 32,000 + 100; models pad their embedding to 32,128 rows).
    """

    def __init__(self, path: str | pathlib.Path, extra_ids: int = 100):
        path = pathlib.Path(path)
        if path.is_dir():
            path = next(iter(sorted(path.glob("*.model"))), path / "spiece.model")
        if not path.is_file():
            raise TextError(f"{path}: no sentencepiece model there; pass the tokenizer's .model file")
        self.path = path
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        start = self.pieces.get_piece_size()
        self.sentinels = Sentinels(start, start + extra_ids - 1)

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels together."""
        return self.sentinels.last + 1

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 `[token]`, without the end token."""
        return np.array(self.pieces.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; sentinel i is written `<extra_id_i>`, padding and everything after `</s>` is left out."""
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if token == 1:
                break
            if self.sentinels.start <= token <= self.sentinels.last:
                parts += [self.pieces.decode(run), f"<extra_id_{self.sentinels.last - token}>"]
                run = []
            elif 0 < token < self.sentinels.start:  # a padded vocabulary has ids that mean nothing
                run.append(token)
        return " ".join(part for part in [*parts, self.pieces.decode(run)] if part)


def segments(documents: Iterable[str], tokenizer: Tokenizer, length: int) -> list[np.ndarray]:
    """Cut every document into consecutive pieces of `length` tokens; a rest of under half a piece is left out."""
    pieces = []
    for document in documents:
        tokens = tokenizer.encode(document)
        for start in range(0, len(tokens), length):
            piece = tokens[start : start + length]
            if 2 * len(piece) >= length:
                pieces.append(piece)
    return pieces


def short_texts(
    documents: Iterable[str], tokenizer: Tokenizer, limit: int, count: int | None = None
) -> list[np.ndarray]:
    """The first `count` documents of at most `limit` tokens, end token included; longer ones are skipped.

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
