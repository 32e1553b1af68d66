"""What all commands share: --json and --debug, how an answer is printed, how a failure is."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from qmoe_jax.cli.console import print_json, stderr, stdout
from qmoe_jax.cli.failures import FAILED, INTERRUPTED, OK, describe, message

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error; so does the environment's QMOE_DEBUG=1."),
]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command found: `fields` for --json, `shown` for people, and the exit code."""

    fields: Mapping[str, Any]
    shown: tuple[RenderableType, ...]
    exit_code: int = OK

    def print(self, as_json: bool) -> None:
        """Print it on stdout."""
        if as_json:
            print_json(self.fields)
            return
        console = stdout()
        for part in self.shown:
            console.print(part, soft_wrap=isinstance(part, str))


def command(run: Callable[..., Answer]) -> Callable[..., None]:
    """Make a typer command of a function that answers: with --json and --debug, and failures told in plain words.

    With --json a failure is told on stdout too, as an object with the member "error".
    """

    @functools.wraps(run)
    def wrapper(*, as_json: bool, debug: bool, **arguments: Any) -> None:
        try:
            answer = run(**arguments)
            answer.print(as_json)
        except KeyboardInterrupt as interrupt:
            stderr().print(f"stopped. {interrupt}".rstrip(), soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise
        except Exception as error:
            if debug or os.environ.get("QMOE_DEBUG", "") not in ("", "0"):
                raise
            fields = describe(error)
            if as_json:
                print_json({"error": fields})
            stderr().print(message(fields), style="red", soft_wrap=True)
            raise typer.Exit(FAILED) from None
        raise typer.Exit(answer.exit_code)

    _add_options(wrapper, run, as_json=AsJson, debug=Debug)
    return wrapper


def _add_options(wrapper: Any, run: Callable[..., Answer], **options: Any) -> None:
    """Give `wrapper` the parameters of `run` and, after them, flags of these annotations."""
    signature = inspect.signature(run, eval_str=True)
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in options.items()
    ]
    parameters = [*signature.parameters.values(), *flags]
    wrapper.__signature__ = signature.replace(parameters=parameters, return_annotation=None)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
