"""The sentinels of a tokenizer: the ids that stand for the missing spans of a text.

Their ids come from their names, `<extra_id_0>` and so on, never from their place: in the model's file where
it holds them (T5X's cc_all.32000.100extra, mT5's; seqio writes the names with a "▁" in front), else in the
files that Hugging Face keeps beside it. Where nothing names them, they stand above the file's pieces, the
first one highest, as T5's do.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import sentencepiece

from qmoe_jax.data.errors import TextError
from qmoe_jax.files.reading import read_json

T5_COUNT = 100
"""Number of sentinels of T5's tokenizers, and of one about which nothing says otherwise."""

CONFIG_FILE = "tokenizer_config.json"
SIDE_FILES = (CONFIG_FILE, "added_tokens.json", "tokenizer.json", "special_tokens_map.json")
"""Files of Hugging Face beside a sentencepiece model that may name its sentinels."""

TRAINED_WITH = "pass the tokenizer that the model was trained with"
"""The remedy for a tokenizer that is not the model's."""

_NAME = re.compile(r"▁?<extra_id_(\d+)>")


@dataclasses.dataclass(frozen=True)
class Sentinels:
    """The ids of the sentinels: sentinel i is `ids[i]`."""

    ids: tuple[int, ...]

    @classmethod
    def above(cls, pieces: int, count: int = T5_COUNT) -> Sentinels:
        """Return `count` sentinels above the ids of `pieces` pieces, the first one highest."""
        return cls(tuple(range(pieces + count - 1, pieces - 1, -1)))

    @property
    def count(self) -> int:
        """Number of sentinels."""
        return len(self.ids)

    @property
    def start(self) -> int:
        """The lowest id of a sentinel."""
        return min(self.ids)

    def id(self, index: np.ndarray | int) -> np.ndarray | int:
        """Return the id of sentinel number `index`."""
        return np.asarray(self.ids)[index]

    def number(self, token: int) -> int | None:
        """Return the number of the sentinel with this id; None for another token."""
        return self._numbers.get(token)

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        return {token: number for number, token in enumerate(self.ids)}


def find_sentinels(
    model: sentencepiece.SentencePieceProcessor, path: pathlib.Path, count: int | None = None
) -> Sentinels:
    """Return the sentinels of a tokenizer.

    Args:
        model: the tokenizer.
        path: its file, beside which `SIDE_FILES` may lie. They are read only where the file itself holds no
            sentinels; the first that gives their ids decides, as in transformers.
        count: number of sentinels that the caller expects; by default as many as the files name or, where
            they name none, `T5_COUNT`.

    Raises:
        TextError: the files number sentinels with a gap or twice, give them the ids of other pieces, or have
            another number of them than `count`; or `count` is below 1.
        CheckpointError: a file beside the tokenizer is not a JSON object.
    """
    if count is not None and count < 1:
        raise TextError("too few sentinels", key="extra_ids", expected="at least 1", found=count)
    pieces = model.get_piece_size()
    if found := dict(_named(enumerate(model.id_to_piece(list(range(pieces)))), path)):
        sentinels, place = _numbered(found, path), path
    else:
        sentinels, place = _beside(model, path, count)
    if count is not None and sentinels.count != count:
        raise TextError(
            "names another number of sentinels",
            path=place,
            key="extra_ids",
            expected=f"{sentinels.count}, as the file names",
            found=count,
            remedy=f"leave the option out, or {TRAINED_WITH}",
        )
    return sentinels


def side_file(sentinels: Sentinels) -> dict[str, Any]:
    """Return a `tokenizer_config.json` that names the sentinels as `find_sentinels` and transformers read."""
    names = {str(token): {"content": f"<extra_id_{i}>"} for i, token in enumerate(sentinels.ids)}
    return {"added_tokens_decoder": dict(sorted(names.items())), "extra_ids": sentinels.count}


def _named(tokens: Any, path: pathlib.Path) -> Iterator[tuple[int, int]]:
    """Yield number and id of each sentinel among `tokens`, pairs of an id and a name."""
    seen: dict[int, int] = {}
    for token, name in tokens:
        if isinstance(name, str) and (match := _NAME.fullmatch(name)):
            number = int(match[1])
            if seen.setdefault(number, token) != token:
                raise TextError(
                    "names a sentinel twice",
                    path=path,
                    key=f"<extra_id_{number}>",
                    expected="one id",
                    found=f"{seen[number]} and {token}",
                    remedy=TRAINED_WITH,
                )
            yield number, token


def _numbered(found: Mapping[int, int], path: pathlib.Path) -> Sentinels:
    """Return sentinels from ids by number; these run from 0 without a gap, and no two share an id."""
    if missing := sorted(set(range(max(found) + 1)) - found.keys()):
        raise TextError(
            "has a gap in the numbers of its sentinels",
            path=path,
            expected="numbers from 0 without a gap",
            found=f"{len(found)} up to <extra_id_{max(found)}> without <extra_id_{missing[0]}>",
            remedy=TRAINED_WITH,
        )
    ids = tuple(found[number] for number in range(len(found)))
    if len(set(ids)) < len(ids):
        twice = next(token for token in ids if ids.count(token) > 1)
        raise TextError(
            "gives two sentinels one id",
            path=path,
            expected="an id of its own for each",
            found=f"{twice} for two",
            remedy=TRAINED_WITH,
        )
    return Sentinels(ids)


def _beside(
    model: sentencepiece.SentencePieceProcessor, path: pathlib.Path, count: int | None
) -> tuple[Sentinels, pathlib.Path]:
    """Return the sentinels that a file beside `path` names, else those above the pieces; and that file."""
    pieces, stated = model.get_piece_size(), None
    for name in SIDE_FILES:
        file = path.with_name(name)
        if not file.is_file():
            continue
        content = read_json(file)
        if found := dict(_named(_added_tokens(content, file), file)):
            sentinels = _numbered(found, file)
            if sentinels.start < pieces:
                token = sentinels.start
                raise TextError(
                    "gives a sentinel the id of a piece",
                    path=file,
                    key=f"<extra_id_{sentinels.number(token)}>",
                    expected=f"an id of {pieces} or more, above the pieces of {path.name}",
                    found=f"{token}, there the piece {model.id_to_piece(token)!r}",
                    remedy="take this file and the tokenizer from one and the same model",
                )
            return sentinels, file
        stated = stated or ((number, file) if (number := _stated_count(content, file)) else None)
    if stated is not None:
        return Sentinels.above(pieces, stated[0]), stated[1]
    return Sentinels.above(pieces, T5_COUNT if count is None else count), path


def _added_tokens(content: Mapping[str, Any], file: pathlib.Path) -> Iterator[tuple[int, object]]:
    """Yield id and name of the tokens that a file beside the tokenizer adds to its pieces."""
    try:
        if file.name == "added_tokens.json":
            yield from ((int(token), name) for name, token in content.items())
        elif file.name == "tokenizer.json":
            yield from ((int(each["id"]), each["content"]) for each in content.get("added_tokens", ()))
        else:
            added = content.get("added_tokens_decoder") or {}
            yield from ((int(token), each["content"]) for token, each in added.items())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TextError(
            "is damaged",
            path=file,
            expected="added tokens with their ids and names",
            found=f"{error!r}",
            remedy="copy or download the file again",
        ) from error


def _stated_count(content: Mapping[str, Any], file: pathlib.Path) -> int | None:
    """Return the number of sentinels that a file beside the tokenizer states without their ids."""
    if (count := content.get("extra_ids")) is not None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise TextError(
                "states no number of sentinels",
                path=file,
                key="extra_ids",
                expected="an integer of at least 1",
                found=f"{count!r}",
                remedy="correct the file, or copy it again",
            )
        return count
    names = content.get("additional_special_tokens") or ()
    return sum(isinstance(name, str) and bool(_NAME.fullmatch(name)) for name in names)
