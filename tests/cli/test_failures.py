"""Failures of commands: message, exit code, JSON, and the traceback with --debug."""

import errno
import json
import os

import numpy as np
import pytest
import typer
from jax.errors import JaxRuntimeError
from typer.testing import CliRunner

from qmoe_jax import CheckpointError
from qmoe_jax.cli.command import Answer, command
from qmoe_jax.cli.console import to_json
from qmoe_jax.cli.failures import Terminated


def run(error: BaseException, *arguments: str, **environment: str):
    app = typer.Typer()

    @app.command()
    @command
    def fail() -> Answer:
        raise error

    return CliRunner(env=environment).invoke(app, list(arguments))


DAMAGED = CheckpointError(
    "is damaged", path="a [b]/c.bin", key="wi", expected="8 bytes", found="7 bytes", remedy="copy it again"
)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/dense")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DAMAGED,
            "error: a [b]/c.bin: is damaged\n  key: wi\n  expected: 8 bytes\n  found: 7 bytes\n"
            "  remedy: copy it again\n",
        ),
        (
            FULL,
            "error: out/dense: No space left on device\n"
            "  remedy: free some space on that disk, then run the same command again\n",
        ),
        (ValueError("damping: expected at least 0"), "error: damping: expected at least 0\n"),
        (MemoryError(), "error: out of memory\n"),
        (NotImplementedError("mlp: no backend can run"), "error: mlp: no backend can run\n"),
        (ModuleNotFoundError("plots need matplotlib"), "error: plots need matplotlib\n"),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore"),
            "error: out of the device's memory\n  found: Out of memory while trying to allocate 9 bytes.\n"
            "  remedy: make batches smaller, or keep experts elsewhere: --experts host or --experts disk\n",
        ),
        (
            KeyError("wi"),
            "error: KeyError: 'wi'\n  remedy: this may be a bug in qmoe: run the command with --debug, and "
            "report the traceback\n",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_becomes_a_message_without_a_traceback(error, message):
    result = run(error)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)


def test_an_error_becomes_an_object_with_json():
    result = run(DAMAGED, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == {
        "type": "CheckpointError", "problem": "is damaged", "path": "a [b]/c.bin", "key": "wi",
        "expected": "8 bytes",
        "found": "7 bytes", "remedy": "copy it again",
    }  # fmt: skip


def test_debug_raises_the_error_itself():
    assert run(DAMAGED, "--debug").exception is DAMAGED
    assert run(DAMAGED, QMOE_DEBUG="1").exception is DAMAGED
    assert run(DAMAGED, QMOE_DEBUG="0").exception is not DAMAGED


@pytest.mark.parametrize(
    ("interrupt", "exit_code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted.\n"),
        (KeyboardInterrupt("To resume:\n  qmoe x"), 130, "interrupted. To resume:\n  qmoe x\n"),
        (Terminated("To resume:\n  qmoe x"), 143, "terminated. To resume:\n  qmoe x\n"),
    ],
)
def test_ctrl_c_and_sigterm_exit_with_128_and_their_number(interrupt, exit_code, message):
    result = run(interrupt)
    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, "", message)


def test_arrays_and_infinities_become_json_values():
    value = {
        1: np.float32(0.5),
        "a": np.array([1.0, np.nan]),
        "b": (float("inf"), None, True),
        "c": np.dtype("int8"),
    }
    assert to_json(value) == {"1": 0.5, "a": [1.0, None], "b": [None, None, True], "c": "int8"}
