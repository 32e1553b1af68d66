"""Texts as a person gives them to a command: one argument, or the lines of a file or of standard input."""

from __future__ import annotations

import codecs
import dataclasses
import os
import sys
from pathlib import Path

STDIN = "-"
"""The name of a file that stands for standard input."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A text, its line ending, and the place where it was found.

    Attributes:
        text: the text, without its line ending; only an argument holds line ends within.
        ending: "\\n", or "\\r\\n" where the file has that.
        place: file and line in front of a message, such as "texts.txt, line 3: "; empty for an argument.
    """

    text: str
    ending: str = "\n"
    place: str = ""


def argument_line(text: str) -> Line:
    """Return an argument of the command line.

    Raises:
        ValueError: its bytes are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes that the locale's encoding does not hold
        text = _decode(os.fsencode(text), "the text: ")
    return Line(text)


def file_lines(file: Path) -> list[Line]:
    """Return the lines of a UTF-8 file, or of standard input (`-`), that are not blank.

    Only line feeds end lines: a tab, U+2028, U+0085 or a form feed is part of a text. A byte order mark at
    the start is left out.

    Raises:
        ValueError: a line is not UTF-8, or all are blank.
        OSError: the file cannot be read.
    """
    name = "standard input" if str(file) == STDIN else str(file)
    content = _standard_input() if str(file) == STDIN else file.read_bytes()
    found = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        place = f"{name}, line {number}: "
        text = _decode(line, place)
        ending = "\r\n" if text.endswith("\r") else "\n"
        if text.strip():
            found.append(Line(text.removesuffix("\r"), ending, place))
    if not found:
        raise ValueError(f"{name}: expected at least one line of text, found none")
    return found


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise ValueError("standard input: expected text, found it closed")
    return sys.stdin.buffer.read()


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}expected UTF-8, found byte 0x{content[error.start]:02x} at position {error.start}; "
            "convert it first (iconv -t UTF-8)"
        ) from None
