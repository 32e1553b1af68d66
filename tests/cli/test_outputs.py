"""Outputs that cannot be written are refused by every command before anything is read."""

import json
import pathlib
from collections.abc import Iterable

import pytest

import qmoe_jax as qj
from tests.helpers.cli_runs import qmoe

MISSING = "no-such-checkpoint"
"""An input that is never looked for."""
COMMANDS = {
    "compress": ("compress", MISSING, "{}", "--calibration", "no-such-text"),
    **{form: ("convert", MISSING, "{}", "--to", form) for form in ("t5x", "huggingface", "upstream")},
    "compare": ("compare", MISSING, MISSING, "--text", "no-such-text", "--scratch", "{}"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    return tmp_path


def refusal(arguments: Iterable[str]) -> dict[str, str]:
    """Return the error of a command that fails."""
    result = qmoe(*arguments, "--json")
    assert result.exit_code == 1, result.output
    return json.loads(result.stdout)["error"]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("http://127.0.0.1:9/out", "cannot be written: "),
        ("file://host/out", "is a file URL of another host"),
        ("file", "is a file"),
        ("file/out", "is a file"),
        ("x" * 300, "cannot be written"),
    ],
    ids=["http", "file of a host", "a file", "in a file", "too long"],
)
def test_an_output_is_refused_first(here: pathlib.Path, command, output: str, problem: str) -> None:
    error = refusal(part.format(output) for part in command)
    assert error["problem"].startswith(problem)
    assert error["remedy"]
    assert [path.name for path in here.iterdir()] == ["file"]


@pytest.mark.parametrize("command", [COMMANDS[name] for name in ("compress", "huggingface", "upstream")])
def test_what_others_have_written_is_not_overwritten(here: pathlib.Path, command) -> None:
    error = refusal(part.format(here) for part in command)
    assert "file" in error["found"]


@pytest.mark.parametrize("write", [qj.compress, qj.convert, qj.decompress], ids=lambda write: write.__name__)
def test_the_functions_refuse_first_as_well(write, data) -> None:
    arguments = {qj.compress: ([],), qj.convert: ("t5x",), qj.decompress: ("t5x",)}[write]
    with pytest.raises(qj.CheckpointError, match=r"http://127\.0\.0\.1:9/out: cannot be written: "):
        write(data / "hf_tiny_a", "http://127.0.0.1:9/out", *arguments)


@pytest.mark.parametrize("below", [".", "out"])
def test_a_checkpoint_is_not_written_into_itself(here: pathlib.Path, data, below: str) -> None:
    for to in ("t5x", "huggingface"):
        with pytest.raises(qj.CheckpointError, match="input"):
            qj.convert(data / "hf_tiny_a", data / "hf_tiny_a" / below, to)
