"""qmoe compare: how far is a compressed model from its original?"""

from __future__ import annotations

import collections
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import note, stderr, working
from qmoe_jax.cli.samples import (
    ExtraIds,
    MaxTokens,
    SampleRules,
    Seed,
    Segment,
    Split,
    TokenizerFile,
    check_vocabulary,
    find_tokenizer,
    open_tokenizer,
    read_samples,
)

if TYPE_CHECKING:
    from qmoe_jax.evaluation import Comparison


def compare(
    original: Annotated[
        str,
        typer.Argument(
            metavar="ORIGINAL", help="A checkpoint of any format; T5X ones may be URLs.", show_default=False
        ),
    ],
    compressed: Annotated[
        str,
        typer.Argument(
            metavar="COMPRESSED",
            help="What was made of it: an artifact, an upstream directory, or any other checkpoint of the same shape.",
            show_default=False,
        ),
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            help="Held-out text: a .txt or .jsonl file (.gz or .xz too), or a folder of them. May be repeated.",
            show_default=False,
            rich_help_panel="Text",
        ),
    ],
    tokenizer: TokenizerFile = None,
    extra_ids: ExtraIds = 100,
    samples: Annotated[int, typer.Option(min=1, help="Samples at most.", rich_help_panel="Text")] = 128,
    max_tokens: MaxTokens = None,
    segment: Segment = None,
    split: Split = None,
    seed: Seed = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Number format of the computation.")
    ] = "float32",
    experts_per_read: Annotated[
        int, typer.Option(min=1, help="Experts of a layer that are in memory together, of each model.")
    ] = 16,
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="For what does not fit in memory.",
            show_default="the system's folder for temporary files",
        ),
    ] = None,
) -> Answer:
    """Compare a compressed model with its original, on the same text.

    Both run side by side, a layer of each in memory at a time, so that the
    original need not fit. The answer: the relative error of every tensor, how
    far the hidden states drift apart layer by layer, how often the routers
    still agree, how the predictions differ, and both losses. Any two formats
    can be compared; a checkpoint and its converted copy give zeros.

    Examples:
      $ qmoe compare experiments/switch_mini mini-ternary --segment 127 \\
          --text experiments/switch_mini/validation.jsonl.xz
      $ qmoe compare switch-base-128 base-ternary --text c4-validation.json.gz
      $ qmoe compare t5x-original copy --text books/ --json | jq .weight_errors
    """
    import qmoe_jax as qj

    began, rules = time.monotonic(), SampleRules(samples, max_tokens, segment, split, seed)
    with working(f"reading {original}, {compressed} and the text"):
        readers = qj.open_checkpoint(original), qj.open_checkpoint(compressed)
        found = tokenizer or find_tokenizer(original) or find_tokenizer(compressed)
        pieces = open_tokenizer(original, found, extra_ids)
        check_vocabulary(pieces, readers[0].config.vocab_size)
        examples = read_samples(text, pieces, rules)
    note(f"{len(examples):,} samples; tokenizer {pieces.path}")
    with qj.ProgressBar("comparing", console=stderr()) as bar:
        result = qj.compare(
            *readers, examples, dtype=dtype, experts_per_read=experts_per_read, scratch=scratch, progress=bar
        )
    fields = {
        "original": original, "compressed": compressed, "formats": [reader.format for reader in readers],
        "dtype": dtype, **result.to_json(), "seconds": time.monotonic() - began,
    }  # fmt: skip
    notes = [Text(f"note: {text}", style="dim") for text in result.notes]
    return Answer(fields, (_predictions(result), _layers(result), _weights(result), *notes))


def _predictions(result: Comparison) -> Table:
    table = Table("", "original", "compressed", "difference")
    for column in table.columns[1:]:
        column.justify = "right"
    a, b = result.original_loss, result.compressed_loss
    perplexities = math.exp(min(a, 700.0)), math.exp(min(b, 700.0))
    table.add_row("loss (nats)", f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}")
    table.add_row(
        "perplexity", *(f"{p:.2f}" for p in perplexities), f"{perplexities[1] - perplexities[0]:+.2f}"
    )
    table.add_row("next token agrees", "", "", f"{result.next_token_agreement:.2%}")
    table.add_row("KL of the predictions (nats)", "", "", f"{result.kl_divergence:.4g}")
    table.caption = f"{result.tokens:,} predicted tokens in {result.examples:,} samples"
    return table


def _layers(result: Comparison) -> Table:
    table = Table("after layer", "cosine of the states", "same expert")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in result.layers:
        agreement = "" if layer.router_agreement is None else f"{layer.router_agreement:.2%}"
        table.add_row(f"{layer.stack} {layer.layer}", f"{layer.cosine:.6f}", agreement)
    return table


def _weights(result: Comparison) -> Table:
    """A row for each kind of tensor that differs; --json has every tensor."""
    kinds = collections.defaultdict(list)
    for name, error in result.weight_errors.items():
        kinds[re.sub(r"/layers_\d+/", "/layers_*/", name)].append(error)
    table = Table("tensors that differ", "count", "mean error", "largest")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, errors in kinds.items():
        if any(errors):
            differing = sum(map(bool, errors))
            count = f"{differing}" if differing == len(errors) else f"{differing} of {len(errors)}"
            table.add_row(kind, count, f"{sum(errors) / len(errors):.4g}", f"{max(errors):.4g}")
    equal = sum(error == 0 for error in result.weight_errors.values())
    table.caption = f"errors are ‖Q - W‖ / ‖W‖; {equal:,} of {len(result.weight_errors):,} tensors are equal"
    return table
