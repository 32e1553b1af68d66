"""Runs of the command line within a test's own process."""

import json
import pathlib

from typer.testing import CliRunner, Result

from qmoe_jax.cli.app import app

SAMPLES = "24"
"""Number of calibration texts."""


def qmoe(*arguments: object, stdin: bytes | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="qmoe")


def answer(*arguments: object, exit_code: int = 0) -> dict:
    """Return the object that a command prints with --json, and check that stderr is empty."""
    result = qmoe(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (exit_code, ""), result.output
    return json.loads(result.stdout)


def compress_arguments(model: pathlib.Path, texts: pathlib.Path, output: pathlib.Path) -> list[object]:
    """Return the command line that makes the artifact."""
    return ["compress", model, output, "--calibration", texts, "--samples", SAMPLES]
