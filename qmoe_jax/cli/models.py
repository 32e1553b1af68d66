"""Models for the commands that run one: packed where the checkpoint is compressed, its experts where they fit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qmoe_jax.cli.console import note

if TYPE_CHECKING:
    from qmoe_jax.checkpoints import Checkpoint as OpenedCheckpoint
    from qmoe_jax.models import SwitchTransformer

COMPRESSED_FORMATS = ("qmoe", "upstream")
"""Formats whose experts stay packed in memory."""

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint of any format: T5X, Hugging Face, a qmoe artifact, or one of upstream QMoE's directories. "
        "T5X ones may be URLs (gs://, s3://, http://).",
        show_default=False,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        help="Number format of the computation.", show_default="float32 on a CPU, bfloat16 on an accelerator"
    ),
]
Experts = Annotated[
    Literal["device", "host", "disk"] | None,
    typer.Option(
        help="Where packed experts live: in the device's memory, in the host's, or on disk, read as tokens are routed "
        "to them.",
        show_default="what fits",
    ),
]
ExpertCache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for experts from disk, such as 2GB; the least recently used go first.",
        show_default="half of what is free",
    ),
]

UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def load(
    reader: OpenedCheckpoint, dtype: str | None, experts: str | None, expert_cache: str | None
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """The model that `reader` has opened, with packed experts where it is compressed.

    Raises:
      ValueError: a dense checkpoint's experts can live on the device alone.
    """
    import jax

    import qmoe_jax as qj
    from qmoe_jax.artifact.reader import ArtifactReader
    from qmoe_jax.inference.placement import plan_placement

    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    cache = None if expert_cache is None else parse_size(expert_cache)
    if reader.format not in COMPRESSED_FORMATS:
        if experts not in (None, "device"):
            raise ValueError(
                f"--experts {experts}: {reader.path} is not compressed; compress it first (qmoe compress)"
            )
        return qj.load_model(reader.path, dtype)
    if isinstance(reader, ArtifactReader):
        plan = plan_placement(reader, dtype, experts, cache)  # type: ignore[arg-type]
        experts, cache = plan.placement, plan.expert_cache
        note(f"experts: {experts} ({plan.reason})")
    return qj.load_compressed(reader.path, dtype, experts, expert_cache=cache)  # type: ignore[arg-type]


def parse_size(text: str) -> int:
    """Bytes of a size such as 2GB, 1.5 GiB or 500000. Raises `typer.BadParameter` for anything else."""
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?)B?", text.strip().upper())
    try:
        return int(float(match[1]) * UNITS[match[2]]) if match else int(text)
    except (ValueError, KeyError):
        raise typer.BadParameter(f"expected a size such as 2GB or 500MB, found {text!r}") from None
