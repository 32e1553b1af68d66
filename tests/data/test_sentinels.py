"""The sentinels of a tokenizer, by the names that its files give them."""

import json
import pathlib
import shutil

import pytest

from qmoe_jax.data import Sentinels, TextError, Tokenizer
from qmoe_jax.data.infill import Infill
from tests.helpers.tokenizers import append_pieces


def names(numbers, form="<extra_id_{}>") -> list[str]:
    return [form.format(number) for number in numbers]


@pytest.fixture
def inside(tokenizer, tmp_path):
    """Return the tokenizer with pieces appended to its file."""
    return lambda pieces: append_pieces(tokenizer.path, tmp_path / "inside.model", pieces)


@pytest.fixture
def beside(tokenizer, tmp_path):
    """Return the path of the tokenizer with a JSON file beside it."""

    def write(name: str, content: dict) -> pathlib.Path:
        (tmp_path / name).write_text(json.dumps(content))
        return shutil.copyfile(tokenizer.path, tmp_path / "spiece.model")

    return write


@pytest.mark.parametrize("form", ["<extra_id_{}>", "▁<extra_id_{}>"])
def test_sentinels_in_the_file_are_those_above_the_pieces_of_one_without(tokenizer, inside, form):
    """As in T5X's cc_all.32000.100extra, and as seqio names them in mT5's."""
    found = Tokenizer(inside(names(range(99, -1, -1), form)))
    assert found.sentinels == tokenizer.sentinels
    assert found.vocab_size == tokenizer.vocab_size
    text = "the ___ sat, on <extra_id_7>"
    assert Infill.parse(text).encode(found).tolist() == Infill.parse(text).encode(tokenizer).tolist()
    ids = [found.sentinels.id(0), *found.encode("the cat").tolist(), found.sentinels.id(1)]
    assert found.decode(ids) == "<extra_id_0> the cat <extra_id_1>"


def test_names_decide_not_the_order(tokenizer, inside):
    found = Tokenizer(inside([*names([1, 0, 2]), "dog", *names([3])]))
    first = tokenizer.pieces
    assert found.sentinels.ids == (first + 1, first, first + 2, first + 4)
    assert found.decode([first + 4, first + 3]) == "<extra_id_3> dog"


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        (names([0, 1, 3]), r"found: 3 up to <extra_id_3> without <extra_id_2>"),
        (names([1, 2]), r"without <extra_id_0>"),
        ([*names([0, 1]), "▁<extra_id_1>"], r"key: <extra_id_1>\n  expected: one id\n  found: \d+ and \d+"),
    ],
)
def test_sentinels_numbered_with_a_gap_or_twice_are_refused(inside, pieces, found):
    with pytest.raises(TextError, match=found):
        Tokenizer(inside(pieces))


def test_another_number_of_sentinels_than_the_files_is_refused(inside):
    path = inside(names(range(8)))
    assert Tokenizer(path, 8).sentinels.count == 8
    expected = r"inside\.model: .*\n  key: extra_ids\n  expected: 8, .*\n  found: 100\n  remedy: leave "
    with pytest.raises(TextError, match=expected):
        Tokenizer(path, 100)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (
            "tokenizer_config.json",
            lambda ids: {"added_tokens_decoder": {str(t): {"content": n} for n, t in ids}},
        ),
        ("added_tokens.json", dict),
        ("tokenizer.json", lambda ids: {"added_tokens": [{"id": t, "content": n} for n, t in ids]}),
    ],
)
def test_files_beside_the_tokenizer_may_name_its_sentinels(tokenizer, beside, file, content):
    ids = [(f"<extra_id_{i}>", tokenizer.pieces + 4 + i) for i in range(3)]
    found = Tokenizer(beside(file, content(ids)))
    assert found.sentinels.ids == tuple(token for _, token in ids)


@pytest.mark.parametrize(
    "content", [{"extra_ids": 30}, {"additional_special_tokens": [*names(range(30)), "<other>"]}]
)
def test_files_beside_the_tokenizer_may_tell_the_number_of_sentinels(tokenizer, beside, content):
    found = Tokenizer(beside("tokenizer_config.json", content))
    assert found.sentinels == Sentinels.above(tokenizer.pieces, 30)


def test_sentinels_beside_with_the_ids_of_pieces_are_refused(beside):
    path = beside("added_tokens.json", {"<extra_id_0>": 5})
    expected = r"added_tokens\.json: .*\n  key: <extra_id_0>\n  expected: an id of \d+ or more"
    with pytest.raises(TextError, match=expected):
        Tokenizer(path)


@pytest.mark.parametrize("content", [{"extra_ids": "many"}, {"extra_ids": 0}, {"added_tokens_decoder": [1]}])
def test_a_file_beside_of_the_wrong_types_is_named(beside, content):
    with pytest.raises(TextError, match=r"tokenizer_config\.json: "):
        Tokenizer(beside("tokenizer_config.json", content))


def test_the_files_of_a_tokenizer_give_the_same_sentinels_elsewhere(tokenizer, tmp_path):
    ours = Tokenizer(tokenizer.path, 20)
    assert tokenizer.files().keys() == {"tokenizer.model"}
    for name, content in ours.files().items():
        (tmp_path / name).write_bytes(content)
    assert Tokenizer(tmp_path).sentinels == ours.sentinels
