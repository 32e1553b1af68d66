"""Options of the commands that run a model, and loading the model by them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import typer

import qmoe_jax as qj
from pallas_kernels.availability import default_platform
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.cli.console import note, stderr
from qmoe_jax.inference.placement import plan_placement
from qmoe_jax.models import SwitchTransformer

COMPRESSED_FORMATS = ("qmoe", "upstream")
"""Formats whose experts stay packed in memory."""

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint: T5X, Hugging Face, a qmoe artifact, or a compressed directory of upstream QMoE. "
        "Its directory, a file in it that tells the format, or the directory of a run, whose newest whole "
        "step is read. T5X checkpoints can be URLs (gs://, s3://, http://).",
        show_default=False,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        help="Dtype of the computation.", show_default="float32 on a CPU, bfloat16 on an accelerator"
    ),
]
Experts = Annotated[
    Literal["device", "host", "disk"] | None,
    typer.Option(
        help="Where packed experts are kept: in the device's memory, in the host's, or on disk, to be read "
        "when tokens are routed to them.",
        show_default="the first of these that fits",
    ),
]
ExpertCache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for experts from disk, such as 2GB; the least recently used are evicted.",
        show_default="half of the free memory",
    ),
]

UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def open_model(path: str) -> qj.Checkpoint:
    """Open a checkpoint, and print the notes on what opening it had to decide to stderr."""
    checkpoint = qj.open_checkpoint(path)
    for text in checkpoint.notes:
        stderr().print(f"note: {checkpoint.path}: {text}", style="dim", soft_wrap=True)
    return checkpoint


def load(
    checkpoint: qj.Checkpoint,
    dtype: Literal["float32", "bfloat16"] | None,
    experts: Literal["device", "host", "disk"] | None,
    expert_cache: str | None,
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """Load a model, with packed experts if its checkpoint is compressed.

    Raises:
        ValueError: the checkpoint cannot have its experts kept or cached so.
        typer.BadParameter: a cache is given for experts that are not on disk.
    """
    dtype = dtype or ("float32" if default_platform() == "cpu" else "bfloat16")
    cache = None if expert_cache is None else parse_size(expert_cache)
    if cache is not None and experts in ("device", "host"):
        raise typer.BadParameter(f"--expert-cache is for experts on disk: it does not apply to {experts}")
    if checkpoint.format not in COMPRESSED_FORMATS:
        if experts not in (None, "device"):
            raise ValueError(
                f"--experts {experts}: {checkpoint.path} is not compressed; compress it first (qmoe compress)"
            )
        if cache is not None:
            raise ValueError(
                f"--expert-cache: {checkpoint.path} is not compressed; its experts are not cached"
            )
        return qj.load_model(checkpoint, dtype)
    if isinstance(checkpoint, ArtifactReader):
        plan = plan_placement(checkpoint, dtype, experts, cache)
        experts, cache = plan.placement, plan.expert_cache
        note(f"experts: {experts} ({plan.reason})")
    elif cache is not None:
        raise ValueError(
            f"--expert-cache: {checkpoint.path} is upstream QMoE's, whose experts cannot be kept on disk"
        )
    return qj.load_compressed(checkpoint, dtype, experts, expert_cache=cache)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 2GB, 1.5 GiB or 500000.

    Raises:
        typer.BadParameter: the text is not a size.
    """
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?)B?", text.strip().upper())
    try:
        return int(float(match[1]) * UNITS[match[2]]) if match else int(text)
    except (ValueError, KeyError, OverflowError):
        raise typer.BadParameter(f"expected a size such as 2GB or 500MB, found {text!r}") from None
