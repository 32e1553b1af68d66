"""Options of the commands that run a model, and loading the model by them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import jax
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
        "step is read. Artifacts and T5X checkpoints can be URLs (gs://, s3://, http://).",
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
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Devices that share each layer's experts and each batch; every one holds all other parameters.",
        show_default="all GPUs where the experts are kept on them; 1 on a CPU",
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
    devices: int | None = None,
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """Load a model, with packed experts if its checkpoint is compressed.

    Raises:
        ValueError: the checkpoint cannot have its experts kept or cached so, or there are fewer devices.
        typer.BadParameter: a cache is given for experts that are not on disk, or devices for experts that are
            not on them.
    """
    dtype = dtype or ("float32" if default_platform() == "cpu" else "bfloat16")
    cache = None if expert_cache is None else parse_size(expert_cache)
    if cache is not None and experts in ("device", "host"):
        raise typer.BadParameter(f"--expert-cache is for experts on disk: it does not apply to {experts}")
    if devices is not None and devices > 1 and (experts in ("host", "disk") or cache is not None):
        raise typer.BadParameter(
            f"--devices {devices} spreads experts over the memory of devices: it does not apply to experts "
            f"{'on the host' if experts == 'host' else 'on disk'}"
        )
    every = jax.local_device_count() if default_platform() != "cpu" and cache is None else 1
    mesh = qj.device_mesh(devices or every)
    if checkpoint.format not in COMPRESSED_FORMATS:
        if experts not in (None, "device"):
            raise ValueError(
                f"--experts {experts}: {checkpoint.path} is not compressed; compress it first (qmoe compress)"
            )
        if cache is not None:
            raise ValueError(
                f"--expert-cache: {checkpoint.path} is not compressed; its experts are not cached"
            )
        return qj.load_model(checkpoint, dtype, mesh=mesh if mesh.size > 1 else None)
    if isinstance(checkpoint, ArtifactReader):
        plan = plan_placement(checkpoint, dtype, experts, cache, mesh.size)
        if plan.placement != "device" and devices is not None and devices > 1:
            raise ValueError(
                f"--devices {devices}: {checkpoint.path} does not fit on them: {plan.reason}; give more "
                "devices, or leave out --devices to keep experts in host memory or on disk"
            )
        experts, cache = plan.placement, plan.expert_cache
        over = f" over {mesh.size} devices" if experts == "device" and mesh.size > 1 else ""
        note(f"experts: {experts}{over} ({plan.reason})")
    elif cache is not None:
        raise ValueError(
            f"--expert-cache: {checkpoint.path} is upstream QMoE's, whose experts cannot be kept on disk"
        )
    spread = mesh if mesh.size > 1 and experts in (None, "device") else None
    return qj.load_compressed(checkpoint, dtype, experts, expert_cache=cache, mesh=spread)


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
