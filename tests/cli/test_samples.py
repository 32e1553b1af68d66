"""Options for samples: as many as asked for, or a command's own limit."""

import json

import pytest
import typer

from qmoe_jax.cli.samples import SampleOptions
from qmoe_jax.data import TextError, Tokenizer
from tests.helpers.cli_runs import qmoe


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("count", "at_most", "expected"), [(7, 5, 7), (None, 5, 5), (None, 500, 200), (None, None, 200)]
)
def test_a_number_that_is_asked_for_takes_the_place_of_the_limit(texts, tokenizer, count, at_most, expected):
    options = SampleOptions(count, None, None, None, 0, at_most=at_most)
    assert len(options.read([texts], tokenizer)) == expected


def test_more_samples_than_there_are_are_refused(texts, tokenizer):
    with pytest.raises(TextError, match=r"found: 200 in 200 documents(.|\n)*at most 200 samples"):
        SampleOptions(201, None, None, None, 0, at_most=500).read([texts], tokenizer)


def test_options_that_exclude_each_other_are_wrong_usage():
    with pytest.raises(typer.BadParameter, match="give only one"):
        SampleOptions(None, 8, 8, None, 0)


@pytest.mark.parametrize("command", ["evaluate", "compare", "compress"])
@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
def test_a_seed_out_of_range_is_named_before_any_work(tmp_path, command, seed):
    paths = ["model"] if command == "evaluate" else ["model", tmp_path / "out"]
    option = "--calibration" if command == "compress" else "--text"
    result = qmoe(command, *paths, option, "no.jsonl", "--seed", seed)
    assert result.exit_code != 0
    assert "seed: expected an integer of 0 to 4294967295" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_odd_text_is_named_with_its_line(model, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": "one"}\n\n{"text": null}\n')
    arguments = ("evaluate", model, "--text", tmp_path / "odd.jsonl")
    assert qmoe(*arguments).stderr.startswith(
        f"error: {tmp_path / 'odd.jsonl'}, line 3: has a text that is not"
    )
    error = json.loads(qmoe(*arguments, "--json").stdout)["error"]
    assert (error["line"], error["found"]) == (3, "null")
