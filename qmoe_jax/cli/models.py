"""Models for the commands that run one: packed where the checkpoint is compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from qmoe_jax.checkpoints import DenseReader
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


def load(reader: DenseReader, dtype: str | None) -> tuple[SwitchTransformer, dict[str, Any]]:
    """The model that `reader` has opened, with packed experts where it is compressed."""
    import jax

    import qmoe_jax as qj

    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    loader = qj.load_compressed if reader.format in COMPRESSED_FORMATS else qj.load_model
    return loader(reader.path, dtype)
