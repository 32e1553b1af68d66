"""Help of the commands: complete, with examples that parse, and generated from the configuration."""

import dataclasses
import json
import re
import shlex
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

import qmoe_jax.cli.app
from qmoe_jax import CompressionConfig
from qmoe_jax.cli.command import Answer, command
from qmoe_jax.cli.config_options import attribute_docs, config_options
from tests.helpers.cli_runs import qmoe

GROUP = typer.main.get_command(qmoe_jax.cli.app.app)
COMMANDS = dict(sorted(GROUP.commands.items()))


def examples(help_text: str) -> list[list[str]]:
    """Return the arguments of each "$ qmoe ..." line, with its continuation, up to a pipe or redirection."""
    lines = re.sub(r"\\\n\s*", "", help_text)
    return [shlex.split(re.split(r" \| | && | > ", line)[0]) for line in re.findall(r"\$ qmoe (.*)", lines)]


def test_help_names_every_command():
    result = qmoe("--help")
    assert result.exit_code == 0
    for name in ("inspect", "compress", "verify", "evaluate", "compare", "generate", "convert", "bench"):
        assert re.search(rf"\b{name}\b", result.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_parse(name):
    command = COMMANDS[name]
    found = examples(command.help)
    assert len(found) >= 2
    for first, *arguments in found:
        assert first == name
        command.make_context(name, arguments)  # raises where an option is unknown or has a bad value


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    for parameter in COMMANDS[name].params:
        assert parameter.help and parameter.help.endswith("."), f"{name} {parameter.name}"
        text = qmoe(name, "--help").stdout
        assert parameter.opts[0].lstrip("-") in text.replace("PATH", "path")


@pytest.mark.parametrize("field", dataclasses.fields(CompressionConfig), ids=lambda field: field.name)
def test_every_field_of_the_configuration_is_an_option_of_compress(field):
    option = next(p for p in COMMANDS["compress"].params if p.name == field.name)
    assert option.default == field.default
    assert option.opts == [f"--{field.name.replace('_', '-')}"]
    assert option.help == attribute_docs(CompressionConfig)[field.name]


def test_options_become_a_configuration():
    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            bits: number of
                bits: two lines.
            name: a name.
            fast: a flag.
            size: a size.
        """

        bits: Literal["ternary", 2] = "ternary"
        name: Literal["a", "b"] | None = None
        fast: bool = False
        size: int | None = None

    def show(path: str, *, config: Config) -> Answer:
        return Answer({"path": path, "config": config}, ())

    app = typer.Typer()
    app.command()(command(config_options(Config, "Options")(show)))
    run = lambda *arguments: json.loads(CliRunner().invoke(app, ["x", *arguments, "--json"]).stdout)["config"]
    assert run() == dataclasses.asdict(Config())
    assert run("--bits", "2", "--name", "b", "--fast", "--size", "3") == {
        "bits": 2,
        "name": "b",
        "fast": True,
        "size": 3,
    }
    assert CliRunner().invoke(app, ["x", "--bits", "3"]).exit_code == 2
    assert attribute_docs(Config)["bits"] == "Number of bits: two lines."


def test_wrong_usage_exits_with_2(texts):
    assert qmoe("inspect").exit_code == 2
    assert qmoe("evaluate", "x", "--text", texts, "--segment", 8, "--max-tokens", 8).exit_code == 2
    assert qmoe("generate", "x").exit_code == 2
    assert qmoe("convert", "x", "y", "--to", "upstream", "--dtype", "float32").exit_code == 2
    assert qmoe("convert", "x", "y", "--to", "keras").exit_code == 2


def test_options_are_not_abbreviated():
    assert qmoe("inspect", "x", "--js").exit_code == 2
    assert qmoe("insp", "x").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "x", "y", "--to", "huggingface", "--step", 3],
        ["generate", "x", "a ___", "--temperature", 0, "--top-p", 0.5],
        ["generate", "x", "a ___", "--file", "lines.txt"],
    ],
    ids=lambda arguments: arguments[-2],
)
def test_options_that_do_not_apply_are_wrong_usage(arguments):
    assert qmoe(*arguments).exit_code == 2


def test_the_version_is_printed():
    assert re.fullmatch(r"qmoe \d+\.\d+\.\d+\n", qmoe("--version").stdout)
