"""qmoe convert: writes a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

import qmoe_jax as qj
from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import warn
from qmoe_jax.cli.models import CheckpointPath, open_model
from qmoe_jax.data.sentinels import SIDE_FILES
from qmoe_jax.files.durable import write_durably
from qmoe_jax.files.output import new_output_directory, output_directory
from qmoe_jax.files.reading import read_whole
from qmoe_jax.inference.tokenizer import tokenizer_file

TOKENIZER_NAMES = {"t5x": "tokenizer.model", "huggingface": "spiece.model"}
"""Not for upstream, whose loader takes every file of a directory but a few for torch's."""


def convert(
    path: CheckpointPath,
    output: Annotated[
        str,
        typer.Argument(
            help="A directory that is missing or empty; T5X adds its checkpoint_<step>.", show_default=False
        ),
    ],
    to: Annotated[
        Literal["t5x", "huggingface", "upstream"],
        typer.Option(
            help="Format to write. upstream, the original QMoE's, requires a ternary artifact.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            help="Dtype of the stored parameters; not for upstream, whose dtypes are fixed.",
            show_default="as stored; decompressed experts in float32",
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Training step in the name of a T5X checkpoint.", show_default="1"),
    ] = None,
) -> Answer:
    """Write a checkpoint in another format; a compressed one is decompressed.

    Values stay as they are, bit for bit, unless --dtype rounds them. The
    tokenizer beside the checkpoint is copied, except to upstream's format,
    whose loader fails on files of other kinds. Memory: about 1 GB, or the
    largest tensor.

    Examples:
        $ qmoe convert gs://bucket/switch/checkpoint_500100 switch-hf --to huggingface
        $ qmoe convert mini-ternary mini-dense --to t5x --dtype bfloat16
        $ qmoe convert mini-ternary mini-upstream --to upstream
    """
    if to == "upstream" and dtype:
        raise typer.BadParameter("--dtype: the dtypes of upstream's format are fixed")
    if to != "t5x" and step is not None:
        raise typer.BadParameter(f"--step names a T5X checkpoint: it does not apply to --to {to}")
    check = output_directory if to == "t5x" else new_output_directory
    directory = check(output, inputs=(path,))  # raises before anything is read
    checkpoint = open_model(path)
    try:
        with qj.ProgressBar(f"writing {to}", "parameters") as progress:
            written = qj.convert(checkpoint, directory, to, dtype=dtype, step=step or 1, progress=progress)
        tokenizer = _copy_tokenizer(checkpoint, directory / TOKENIZER_NAMES[to]) if to != "upstream" else None
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(f"{output} is incomplete: remove it before you run the command again") from None
    if to == "huggingface" and checkpoint.config.gated:
        warn("transformers has no gated experts: it cannot load this model")
    fields = {
        "path": path, "format": checkpoint.format, "output": written, "output_format": to,
        "tokenizer": tokenizer,
    }  # fmt: skip
    beside = f", with {tokenizer.name} beside it" if tokenizer else ""
    return Answer(fields, (Text(f"{written}: {to}, from {path} ({checkpoint.format}){beside}"),))


def _copy_tokenizer(checkpoint: qj.Checkpoint, target: Path) -> Path | None:
    """Copy the checkpoint's tokenizer, and the files beside it that may name its sentinels.

    Nothing is copied over another file; return None where `target` exists, or nothing is there to copy.
    """
    source = tokenizer_file(checkpoint)
    if source is None or target.exists():
        return None
    for name in SIDE_FILES:
        if source.with_name(name).is_file() and not target.with_name(name).exists():
            write_durably(target.with_name(name), [read_whole(source.with_name(name))])
    write_durably(target, [read_whole(source)])
    return target
