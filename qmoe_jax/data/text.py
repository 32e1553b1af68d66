"""Reads documents from text files: plain text or JSON lines, optionally compressed."""

from __future__ import annotations

import gzip
import json
import lzma
import pathlib
from collections.abc import Iterator

SUFFIXES = (".txt", ".jsonl", ".json")
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


class TextError(ValueError):
    """Text or tokenizer that cannot be used: the message names the file, the problem and the remedy."""


def _is_text(path: pathlib.Path) -> bool:
    suffixes = [suffix for suffix in path.suffixes if suffix not in OPENERS]
    return bool(suffixes) and suffixes[-1] in SUFFIXES


def text_files(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Return the text files at `path`: the file itself, or those of a folder and its subfolders, sorted.

    Raises:
        TextError: `path` is neither a file nor a folder with text files.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and _is_text(p)) if path.is_dir() else []
    if not found:
        raise TextError(f"{path}: no text found; expected .txt or .jsonl files, optionally .gz or .xz")
    return found


def read_documents(path: str | pathlib.Path, split: str | None = None) -> Iterator[str]:
    """Yield the documents at `path`: the "text" of each JSON line, or a .txt file as a whole.

    Args:
        path: a file, or a folder that is searched recursively.
        split: if given, only JSON lines whose "split" field equals it, so that one file can hold several
            splits.

    Raises:
        TextError: no text is found, or a line is not a JSON object with "text".
    """
    for file in text_files(path):
        try:
            yield from _documents_of(file, split)
        except (lzma.LZMAError, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise TextError(f"{file}: is damaged or not UTF-8 text ({error})") from error


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
