"""Documents from text files: plain text, JSON lines or Parquet, optionally compressed.

A line ends with LF, CR or both; other line separators of Unicode may stand in a text. Text is UTF-8; a byte
order mark is left out, and so are blank lines.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import IO, Any

from qmoe_jax.data.errors import TextError
from qmoe_jax.data.json_lines import SHOWN, parse_row, text_of
from qmoe_jax.data.parquet import parquet_rows
from qmoe_jax.data.text_files import TextFile, text_files

MAX_BYTES = 1 << 30
"""Bytes of a line, and of a plain text, which are held in memory whole."""

_OTHER_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_BYTE_ORDER_MARK = "\ufeff"


def read_documents(path: str | os.PathLike[str], split: str | None = None) -> Iterator[str]:
    """Yield the documents at `path`: the "text" of each JSON line or Parquet row, or a .txt file as a whole.

    The last suffix decides how a file is read, and the compression after it: .txt, .jsonl, .ndjson, .json and
    .parquet, with .gz, .bz2, .xz or .zst. Where the name has none, as standard input and pipes do, the text
    decides: JSON lines begin with a brace.

    Memory: one document, or a batch of Parquet rows.

    Args:
        path: a file, a folder that is searched recursively (`text_files`), or `-` for standard input.
        split: if given, only JSON lines and Parquet rows whose "split" equals it, so that one file can hold
            several splits.

    Raises:
        TextError: no text is found, a file is damaged, or a line is not a JSON object with a string "text".
    """
    some = False
    for file in text_files(path):
        for row, number in read_rows(file):
            some = True
            if split is None or row.get("split") == split:
                yield text_of(row, file.path, number)
    if not some:
        raise TextError(
            "holds no text", path=path, expected="at least one document", found="nothing or blanks"
        )


def read_rows(file: TextFile) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Yield the JSON objects or Parquet rows of a file with their numbers; a plain text is one row, {"text"}.

    Raises:
        TextError: the file is damaged, or a line of it is not a JSON object.
    """
    if file.kind == "parquet":
        yield from ((row, number) for number, row in enumerate(parquet_rows(file.path), 1))
        return
    with file.open() as stream:
        lines, is_json = _lines(stream, file.path), file.kind == "json"
        if file.kind is None:
            lines = itertools.dropwhile(lambda line: not line[1].strip(), lines)
            first = list(itertools.islice(lines, 1))
            is_json = any(line.lstrip().startswith(("{", "[")) for _, line in first)
            lines = itertools.chain(first, lines)
        if is_json:
            for number, line in lines:
                if stripped := line.strip().removeprefix(_BYTE_ORDER_MARK).lstrip():
                    yield parse_row(stripped, file.path, number), number
        elif (text := _joined(lines, file.path)).strip():
            yield {"text": text}, None


def _joined(lines: Iterator[tuple[int, str]], path: object) -> str:
    """Return a plain text. Raises `TextError` where it is longer than `MAX_BYTES`, in characters."""
    kept, size = [], 0
    for number, line in lines:
        kept.append(line)
        if (size := size + len(line)) > MAX_BYTES:
            raise _too_long("the text up to here", path, number)
    return "".join(kept)


def _lines(stream: IO[bytes], path: object) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text with their numbers, each with LF at its end if it has an end.

    Raises:
        TextError: a line is not UTF-8 text, or longer than `MAX_BYTES`.
    """
    number = 0
    while raw := stream.readline(MAX_BYTES + 1):
        if number == 0:
            _check_encoding(raw, path)
            raw = raw.removeprefix(_BYTE_ORDER_MARK.encode())
        if len(raw) > MAX_BYTES:
            raise _too_long("the line", path, number + 1)
        for line in raw.splitlines(keepends=True):  # of bytes: at LF, CR and CR LF
            number += 1
            yield number, _decoded(line, path, number)


def _decoded(line: bytes, path: object, number: int) -> str:
    if b"\0" in line:
        raise TextError(
            "holds NUL bytes, so it is not text",
            path=path,
            line=number,
            expected="UTF-8 text",
            found=f"{line[:SHOWN]!r}",
            remedy="copy or download the file again, or write it as UTF-8",
        )
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise TextError(
            "is not UTF-8 text",
            path=path,
            line=number,
            expected="UTF-8",
            found=f"byte 0x{line[error.start]:02x} as byte {error.start + 1} of the line",
            remedy="write it as UTF-8: iconv -f ISO-8859-1 -t UTF-8, with the encoding that it has",
        ) from error
    return text.rstrip("\r\n") + "\n" if text.endswith(("\r", "\n")) else text


def _check_encoding(start: bytes, path: object) -> None:
    """Refuse by name what is not UTF-8 text."""
    for mark, encoding in _OTHER_ENCODINGS.items():
        if start.startswith(mark):
            raise TextError(
                f"is {encoding} text",
                path=path,
                expected="UTF-8",
                found=f"the byte order mark of {encoding}",
                remedy=f"write it as UTF-8: iconv -f {encoding} -t UTF-8",
            )
    if start.startswith(b"PAR1"):
        raise TextError(
            "is a Parquet file, which is read by its name only",
            path=path,
            expected="text",
            remedy="pass it as a file whose name ends in .parquet",
        )


def _too_long(part: str, path: object, number: int) -> TextError:
    return TextError(
        f"{part} is too long",
        path=path,
        line=number,
        expected=f"at most {MAX_BYTES:,} bytes",
        remedy="write its documents as JSON lines, or as several files",
    )
