"""JSON lines: one object per line, whose "text" is a document."""

from __future__ import annotations

import json
from typing import Any

from qmoe_jax.data.errors import TextError

SHOWN = 60
"""Characters of a line or value that a message shows."""

_CORRECT = "correct the line, or let the name of plain text end in .txt"
_ONE_LINE = "write each object on one line (jq -c .); if the file was cut off here, copy or download it again"
_ARRAY = "write an array as JSON lines: jq -c '.[]' array.json > lines.jsonl"


def parse_row(line: str, path: object, number: int) -> dict[str, Any]:
    """Return the object of one line.

    Raises:
        TextError: the line is not a JSON object, or has two members "text".
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        reason = "nested too deeply" if deep else str(error)
        raise TextError(
            "is not JSON",
            path=path,
            line=number,
            expected='one JSON object per line, with "text"',
            found=f"{line[:SHOWN]!r} ({reason})",
            remedy=_remedy(line),
        ) from error
    if not isinstance(row, dict):
        raise TextError(
            "is not a JSON object",
            path=path,
            line=number,
            expected='one JSON object per line, with "text"',
            found=describe(row),
            remedy=_ARRAY if isinstance(row, list) else None,
        )
    if line.count('"text"') > 1:
        pairs = json.loads(line, object_pairs_hook=tuple)
        if (texts := sum(key == "text" for key, _ in pairs)) > 1:
            raise TextError(
                "has more than one text", path=path, line=number, expected='one "text"', found=f"{texts}"
            )
    return row


def _remedy(line: str) -> str:
    if line.startswith("["):
        return _ARRAY
    return _ONE_LINE if line.startswith("{") and not line.endswith("}") else _CORRECT


def text_of(row: dict[str, Any], path: object, number: int | None) -> str:
    """Return the text of a row.

    Args:
        row: the object.
        path: its file, for messages.
        number: its line.

    Raises:
        TextError: "text" is missing, is not a string, or is not Unicode.
    """
    if "text" not in row:
        keys = ", ".join(map(repr, row)) or "none"
        raise TextError(
            "has no text",
            path=path,
            line=number,
            expected='a JSON object with "text"',
            found=f"members {keys[: 2 * SHOWN]}",
            remedy='rename the member that holds the text to "text"',
        )
    text = row["text"]
    if not isinstance(text, str):
        raise TextError(
            "has a text that is not a string",
            path=path,
            line=number,
            expected='a string as "text"',
            found=describe(text),
            remedy="remove the line, or write its text as a string",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            "has a text that is not Unicode",
            path=path,
            line=number,
            expected="surrogates in pairs",
            found=f"the lone surrogate \\u{ord(text[error.start]):04x} at character {error.start + 1}",
            remedy="remove it, or write the character that it is half of",
        ) from error
    return text


def describe(value: Any) -> str:
    """Return the type of a JSON value in words, and the value if it is short."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    kind = kinds.get(type(value), "a number")
    return f"{kind}, {json.dumps(value)[:SHOWN]}" if isinstance(value, str | int | float) else kind
