"""Help: complete, with examples that parse, and without loading what only running needs."""

import ast
import dataclasses
import pathlib
import re
import shlex
import sys

import pytest
import typer

import qmoe_jax.cli.app
from qmoe_jax import CompressionConfig
from tests.helpers.cli_runs import qmoe

GROUP = typer.main.get_command(qmoe_jax.cli.app.app)
COMMANDS = dict(sorted(GROUP.commands.items()))
MODULES = sorted(pathlib.Path(qmoe_jax.cli.app.__file__).parent.glob("*.py"))
LIGHT = {"typer", "rich", *sys.stdlib_module_names}


def examples(help_text: str) -> list[list[str]]:
    """The arguments of each "$ qmoe ..." line, its continuation included, up to what a shell takes."""
    lines = re.sub(r"\\\n\s*", "", help_text)
    return [shlex.split(re.split(r" \| | && | > ", line)[0]) for line in re.findall(r"\$ qmoe (.*)", lines)]


def test_every_command_is_named():
    result = qmoe("--help")
    assert result.exit_code == 0
    for name in ("inspect", "compress", "verify", "evaluate", "compare", "generate", "convert", "bench"):
        assert re.search(rf"\b{name}\b", result.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name):
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
def test_every_setting_of_a_compression_is_an_option(field):
    option = next(p for p in COMMANDS["compress"].params if p.name == field.name)
    assert option.default == field.default


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_help_loads_nothing_heavy(path):
    # At the top of a module stand only the standard library, typer, rich and other modules of the command line.
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for module in modules:
            light = module.split(".")[0] in LIGHT or module.startswith("qmoe_jax.cli")
            assert light, f"{path.name} imports {module} before a command runs"


def test_wrong_usage_exits_with_2(texts):
    assert qmoe("inspect").exit_code == 2
    assert qmoe("evaluate", "x", "--text", texts, "--segment", 8, "--max-tokens", 8).exit_code == 2
    assert qmoe("generate", "x").exit_code == 2
    assert qmoe("convert", "x", "y", "--to", "upstream", "--dtype", "float32").exit_code == 2
    assert qmoe("convert", "x", "y", "--to", "keras").exit_code == 2


def test_the_version_is_printed():
    assert re.fullmatch(r"qmoe \d+\.\d+\.\d+\n", qmoe("--version").stdout)
