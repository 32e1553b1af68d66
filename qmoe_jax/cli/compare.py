"""qmoe compare: measures how far a compressed model is from its original."""

from __future__ import annotations

import collections
import math
import re
import time
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

import qmoe_jax as qj
from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import note, working
from qmoe_jax.cli.models import open_model
from qmoe_jax.cli.samples import (
    ExtraIds,
    HeldOutText,
    MaxTokens,
    SampleOptions,
    Seed,
    Segment,
    Split,
    TokenizerFile,
    load_tokenizer,
)
from qmoe_jax.files.output import output_directory
from qmoe_jax.inference.tokenizer import tokenizer_file


def compare(
    original: Annotated[
        str,
        typer.Argument(
            metavar="ORIGINAL",
            help="A checkpoint of any format; T5X checkpoints can be URLs.",
            show_default=False,
        ),
    ],
    compressed: Annotated[
        str,
        typer.Argument(
            metavar="COMPRESSED",
            help="The model made of it: an artifact, or any checkpoint of the same architecture.",
            show_default=False,
        ),
    ],
    text: HeldOutText,
    tokenizer: TokenizerFile = None,
    extra_ids: ExtraIds = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of samples.",
            show_default="128, or all where there are fewer",
            rich_help_panel="Text",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    segment: Segment = None,
    split: Split = None,
    seed: Seed = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Dtype of the computation.")
    ] = "float32",
    experts_per_read: Annotated[
        int, typer.Option(min=1, help="Experts of a layer in memory together, of each model.")
    ] = 16,
    scratch: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for data that does not fit in memory.",
            show_default="the system's folder for temporary files",
        ),
    ] = None,
) -> Answer:
    """Compare a compressed model with its original, on the same text.

    Both models run side by side, one layer of each in memory at a time, so
    that the original need not fit. Reported are the relative error of every
    tensor, the similarity of hidden states after each layer, the agreement of
    the routers, the difference of the predictions, and both losses. Any two
    formats can be compared; a checkpoint and its converted copy give zeros.

    Examples:
        $ qmoe compare experiments/switch_mini mini-ternary --segment 127 \\
                --text experiments/switch_mini/validation.jsonl.xz
        $ qmoe compare switch-base-128 base-ternary --text c4-validation.json.gz
        $ qmoe compare t5x-original copy --text books/ --json | jq .weight_errors
    """
    if scratch is not None:
        output_directory(scratch)  # raises before anything is read
    began, options = time.monotonic(), SampleOptions(samples, max_tokens, segment, split, seed, at_most=128)
    with working(f"reading {original}, {compressed} and the text"):
        checkpoints = open_model(original), open_model(compressed)
        found = tokenizer or next(filter(None, (tokenizer_file(each) for each in checkpoints)), None)
        tokens = load_tokenizer(checkpoints[0], found, extra_ids)
        examples = options.read(text, tokens)
    note(f"{len(examples):,} samples; tokenizer {tokens.path}")
    with qj.ProgressBar("comparing") as progress:
        result = qj.compare(
            *checkpoints, examples, dtype=dtype, experts_per_read=experts_per_read, scratch=scratch,
            progress=progress,
        )  # fmt: skip
    fields = {
        "original": original, "compressed": compressed, "formats": [each.format for each in checkpoints],
        "dtype": dtype, **result.to_json(), "seconds": time.monotonic() - began,
    }  # fmt: skip
    notes = [Text(f"note: {text}", style="dim") for text in result.notes]
    return Answer(fields, (_predictions(result), _layers(result), _weights(result), *notes))


def _predictions(result: qj.Comparison) -> Table:
    table = Table("", "original", "compressed", "difference")
    for column in table.columns[1:]:
        column.justify = "right"
    a, b = result.original_loss, result.compressed_loss
    perplexities = math.exp(min(a, 700.0)), math.exp(min(b, 700.0))
    table.add_row("loss (nats)", f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}")
    table.add_row(
        "perplexity", *(f"{p:.2f}" for p in perplexities), f"{perplexities[1] - perplexities[0]:+.2f}"
    )
    table.add_row("same next token", "", "", f"{result.next_token_agreement:.2%}")
    table.add_row("KL divergence (nats)", "", "", f"{result.kl_divergence:.4g}")
    table.caption = f"{result.tokens:,} predicted tokens in {result.examples:,} samples"
    return table


def _layers(result: qj.Comparison) -> Table:
    table = Table("after layer", "cosine of hidden states", "same expert")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in result.layers:
        agreement = "" if layer.router_agreement is None else f"{layer.router_agreement:.2%}"
        table.add_row(f"{layer.stack} {layer.layer}", f"{layer.cosine:.6f}", agreement)
    return table


def _weights(result: qj.Comparison) -> Table:
    """Return a table with one row per kind of tensor that differs; --json has every tensor."""
    kinds = collections.defaultdict(list)
    for name, error in result.weight_errors.items():
        kinds[re.sub(r"/layers_\d+/", "/layers_*/", name)].append(error)
    table = Table("tensors that differ", "count", "mean error", "largest error")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, errors in kinds.items():
        if any(errors):
            differing = sum(map(bool, errors))
            count = f"{differing}" if differing == len(errors) else f"{differing} of {len(errors)}"
            table.add_row(kind, count, f"{sum(errors) / len(errors):.4g}", f"{max(errors):.4g}")
    equal = sum(error == 0 for error in result.weight_errors.values())
    table.caption = f"error: ‖Q - W‖ / ‖W‖; {equal:,} of {len(result.weight_errors):,} tensors are equal"
    return table
