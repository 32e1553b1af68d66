"""The frame of every command: --json and --debug, printing of answers and of failures."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from pallas_kernels.cpu.ffi import raise_interrupts
from qmoe_jax.cli.console import Verbatim, print_json, print_verbatim, stdout
from qmoe_jax.cli.failures import OK, describe, report, traceback_wanted

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error; so does QMOE_DEBUG=1 in the environment."),
]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of a command.

    Attributes:
        fields: the JSON object that --json prints.
        shown: tables and lines for people, and texts that go out as they are.
        exit_code: exit code of the process.
    """

    fields: Mapping[str, Any]
    shown: tuple[RenderableType | Verbatim, ...]
    exit_code: int = OK

    def print(self, as_json: bool) -> None:
        """Print the answer to stdout."""
        if as_json:
            print_json(self.fields)
            return
        console = stdout()
        for part in self.shown:
            if isinstance(part, Verbatim):
                print_verbatim(part)
            else:
                console.print(part, soft_wrap=isinstance(part, str))


def command(run: Callable[..., Answer]) -> Callable[..., None]:
    """Turn a function that returns an answer into a typer command with --json and --debug.

    A failure becomes a message on stderr and an exit code. With --json it is also printed to stdout, as an
    object with the member "error".
    """

    @functools.wraps(run)
    def wrapper(*, as_json: bool, debug: bool, **arguments: Any) -> None:
        try:
            with raise_interrupts():
                answer = run(**arguments)
            answer.print(as_json)
        except (typer.Exit, typer.BadParameter):
            raise
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(report(interrupt)) from None
        except Exception as error:
            if debug or traceback_wanted():
                raise
            if as_json:
                print_json({"error": describe(error)})
            raise typer.Exit(report(error)) from None
        raise typer.Exit(answer.exit_code)

    signature = inspect.signature(run, eval_str=True)
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in {"as_json": AsJson, "debug": Debug}.items()
    ]
    set_parameters(wrapper, [*signature.parameters.values(), *flags])
    return wrapper


def set_parameters(function: Any, parameters: list[inspect.Parameter]) -> None:
    """Make typer see `parameters` in place of a function's own."""
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
