"""Runs of the command line within a test's own process."""

import json
import pathlib

from typer.testing import CliRunner, Result

from qmoe_jax.cli.app import app

SAMPLES = "24"
"""Texts that calibrate."""


def qmoe(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="qmoe")


def answer(*arguments: object, exit_code: int = 0) -> dict:
    """What a command prints with --json: one object, and nothing on stderr."""
    result = qmoe(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (exit_code, ""), result.output
    return json.loads(result.stdout)


def compress_arguments(model: pathlib.Path, texts: pathlib.Path, output: pathlib.Path) -> list[object]:
    """The command that the artifact is made by."""
    return ["compress", model, output, "--calibration", texts, "--samples", SAMPLES]
