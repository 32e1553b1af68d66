"""qmoe convert: one checkpoint format into another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import working
from qmoe_jax.cli.failures import Interrupted
from qmoe_jax.cli.models import Checkpoint
from qmoe_jax.cli.samples import find_tokenizer

if TYPE_CHECKING:
    from qmoe_jax.checkpoints import DenseReader

TOKENIZER_NAMES = {"t5x": "tokenizer.model", "huggingface": "spiece.model", "upstream": "spiece.model"}


def convert(
    path: Checkpoint,
    output: Annotated[
        Path,
        typer.Argument(
            help="A directory that is missing or empty; T5X adds its checkpoint_<step>.", show_default=False
        ),
    ],
    to: Annotated[
        Literal["t5x", "huggingface", "upstream"],
        typer.Option(
            help="The format to write. upstream, the original QMoE's, takes a ternary artifact.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            help="Store parameters as this; not for upstream, which fixes its own.",
            show_default="as they are; decompressed experts in float32",
        ),
    ] = None,
    step: Annotated[int, typer.Option(min=1, help="Training step that a T5X checkpoint is numbered by.")] = 1,
) -> Answer:
    """Write a checkpoint in another format; a compressed one is decompressed.

    Values stay as they are, bit for bit, unless --dtype rounds them. A
    tokenizer that lies with the checkpoint is copied along. Memory: about
    1 GB, or the largest tensor.

    Examples:
      $ qmoe convert gs://bucket/switch/checkpoint_500100 switch-hf --to huggingface
      $ qmoe convert mini-ternary mini-dense --to t5x --dtype bfloat16
      $ qmoe convert mini-ternary mini-upstream --to upstream
    """
    import qmoe_jax as qj

    if to == "upstream" and dtype:
        raise typer.BadParameter("--dtype: upstream's format fixes its own")
    reader = qj.open_checkpoint(path)
    try:
        with working(f"writing {reader.config.expert_parameters:,} expert parameters to {output}"):
            written = _write_upstream(output, reader) if to == "upstream" else qj.convert(
                reader, output, to, dtype=dtype, step=step
            )  # fmt: skip
            tokenizer = _copy_tokenizer(path, output / TOKENIZER_NAMES[to])
    except KeyboardInterrupt:
        raise Interrupted(f"{output} is incomplete: remove it before you try again") from None
    fields = {
        "path": path, "format": reader.format, "output": written, "output_format": to, "tokenizer": tokenizer,
    }  # fmt: skip
    beside = f", with {tokenizer.name} beside it" if tokenizer else ""
    return Answer(fields, (Text(f"{written}: {to}, from {path} ({reader.format}){beside}"),))


def _copy_tokenizer(checkpoint: str, target: Path) -> Path | None:
    """Copy the tokenizer found with the checkpoint, unless the target has one; None where nothing was copied."""
    source = find_tokenizer(checkpoint)
    if source is None or target.exists():
        return None
    return Path(shutil.copyfile(source, target))


def _write_upstream(output: Path, reader: DenseReader) -> Path:
    """Write a ternary artifact as upstream QMoE would have.

    Raises:
      CheckpointError: it is no artifact, or has experts that are not ternary with levels a row.
    """
    from qmoe_jax.artifact.kinds import Ternary
    from qmoe_jax.artifact.matrices import unpack_digits
    from qmoe_jax.artifact.reader import ArtifactReader, PackedKernel
    from qmoe_jax.checkpoints.upstream.writer import TernaryMatrix, write_upstream
    from qmoe_jax.files.errors import CheckpointError
    from qmoe_jax.parameters import is_expert

    expected = (
        "an artifact whose experts are all ternary, with levels a row (qmoe compress without --group-size)"
    )
    if not isinstance(reader, ArtifactReader):
        raise CheckpointError(
            "cannot be written in upstream's format", path=reader.path, expected=expected,
            found=f"a {reader.format} checkpoint", remedy="compress it first",
        )  # fmt: skip
    for name in filter(is_expert, reader.names()):
        kind = reader.kind(name)
        if not isinstance(kind, Ternary) or kind.group_size is not None or kind.input_scaled:
            raise CheckpointError(
                "cannot be written in upstream's format", path=reader.path, key=name, expected=expected,
                found=kind or "not compressed",
            )  # fmt: skip

    def ternary(name: str, expert: int) -> TernaryMatrix:
        kernel = reader.tensors[name]
        assert isinstance(kernel, PackedKernel)
        matrix = next(kernel.layer.read(slice(expert, expert + 1)))[kernel.matrix]
        return unpack_digits(matrix, reader.codebooks), matrix.parts["levels"]

    return write_upstream(output, reader, ternary)
