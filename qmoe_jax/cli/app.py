"""The application that holds the commands of `qmoe`."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, NoReturn

import typer

from qmoe_jax.cli.bench import bench
from qmoe_jax.cli.command import command
from qmoe_jax.cli.compare import compare
from qmoe_jax.cli.compress import compress
from qmoe_jax.cli.convert import convert
from qmoe_jax.cli.evaluate import evaluate
from qmoe_jax.cli.generate import generate
from qmoe_jax.cli.inspect import inspect
from qmoe_jax.cli.streams import run_program
from qmoe_jax.cli.verify import verify

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
for function in (inspect, compress, verify, evaluate, compare, generate, convert, bench):
    app.command()(command(function))


def _print_version(requested: bool) -> None:
    if requested:
        print(f"qmoe {importlib.metadata.version('qmoe-jax')}")
        raise typer.Exit


@app.callback()
def qmoe(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Compress Switch Transformers below one bit per parameter, and run them.

    Examples:
        $ qmoe inspect switch-base-128
        $ qmoe compress switch-base-128 base-ternary --calibration c4.json.gz
        $ qmoe generate base-ternary "The ___ sat on the mat."

    Every command has --help with examples, and --json for scripts.

    Exit codes: 0 OK, 1 error (also where standard output is full or closed),
    2 wrong usage, 3 `qmoe verify` found problems, 130 interrupted with Ctrl-C,
    141 the reader of the output's pipe left, 143 terminated.
    """


def main() -> NoReturn:
    """Run the command line, and exit."""
    run_program(lambda: app(prog_name="qmoe"))
