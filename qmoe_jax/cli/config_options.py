"""Generates a command's options from a dataclass: names, defaults, choices and help texts."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from qmoe_jax.cli.command import Answer, set_parameters


def config_options(config: Any, panel: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Return a decorator that gives a command one option per field of the dataclass `config`.

    The command itself takes a keyword argument `config`, an instance made of the options. An option's help
    text is the field's entry in the "Attributes" section of the class's docstring.

    Args:
        config: a dataclass with a default for every field; fields may be bool, int, float, str, a `Literal`,
            or one of these or None.
        panel: title of the options in the command's help.
    """
    hints, helps = typing.get_type_hints(config), attribute_docs(config)
    fields = dataclasses.fields(config)

    def decorate(run: Callable[..., Answer]) -> Callable[..., Answer]:
        @functools.wraps(run)
        def with_config(**arguments: Any) -> Answer:
            values = {field.name: arguments.pop(field.name) for field in fields}
            chosen = {name: _choices(hints[name]).get(value, value) for name, value in values.items()}
            return run(**arguments, config=config(**chosen))

        own = [p for p in inspect.signature(run, eval_str=True).parameters.values() if p.name != "config"]
        options = [_option(field, hints[field.name], helps[field.name], panel) for field in fields]
        set_parameters(with_config, [*own, *options])
        return with_config

    return decorate


def attribute_docs(documented: type) -> dict[str, str]:
    """Return the entries of the "Attributes" section of a class's docstring, each on one line."""
    section = (inspect.getdoc(documented) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section, flags=re.MULTILINE | re.DOTALL)
    texts = {name: " ".join(text.split()) for name, text in entries}
    return {name: text[0].upper() + text[1:] for name, text in texts.items()}


def _option(field: dataclasses.Field[Any], hint: Any, text: str, panel: str) -> inspect.Parameter:
    """Return a field as a parameter that typer makes an option of."""
    choices, optional = _choices(hint), types.NoneType in typing.get_args(hint)
    kind = Literal[tuple(choices)] if choices else next(k for k in (*typing.get_args(hint), hint) if k)
    option = typer.Option(
        *([f"--{field.name.replace('_', '-')}"] if hint is bool else []),  # no --no-... beside a flag
        help=text,
        show_default=field.default is not None,
        rich_help_panel=panel,
    )
    annotation: Any = Annotated[kind | None if optional else kind, option]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
    )


def _choices(hint: Any) -> dict[str | None, Any]:
    """Return the values of a `Literal` (or one of it or None) by their text; empty for other types."""
    literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is Literal]
    return {str(value): value for literal in literals for value in typing.get_args(literal)}
