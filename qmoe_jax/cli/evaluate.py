"""qmoe evaluate: how good is a model on a text?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import progress, working
from qmoe_jax.cli.models import Checkpoint, Dtype, ExpertCache, Experts, load
from qmoe_jax.cli.samples import (
    ExtraIds,
    MaxTokens,
    SampleRules,
    Seed,
    Segment,
    Split,
    TokenizerFile,
    check_vocabulary,
    open_tokenizer,
    read_samples,
)


def evaluate(
    path: Checkpoint,
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
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Samples at most.", show_default="all there are", rich_help_panel="Text"),
    ] = None,
    max_tokens: MaxTokens = None,
    segment: Segment = None,
    split: Split = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples that run through the model together.")] = 16,
    dtype: Dtype = None,
    experts: Experts = None,
    expert_cache: ExpertCache = None,
) -> Answer:
    """Measure a model's loss on held-out text.

    Spans of each text are masked as in training (15 % of the tokens, 3 a span
    on average), and the model says what stood there. Loss is the mean
    cross-entropy of a token in nats. A compressed model runs packed, as it is.

    Examples:
      $ qmoe evaluate mini-ternary --text validation.jsonl.xz --segment 127
      $ qmoe evaluate switch-base-128 --text c4-validation.json.gz --samples 128
      $ qmoe evaluate mini-ternary --text books/ --segment 127 --json | jq .loss
    """
    import qmoe_jax as qj

    began, rules = time.monotonic(), SampleRules(samples, max_tokens, segment, split, seed)
    with working(f"reading {path} and the text"):
        reader = qj.open_checkpoint(path)
        pieces = open_tokenizer(path, tokenizer, extra_ids)
        check_vocabulary(pieces, reader.config.vocab_size)
        examples = read_samples(text, pieces, rules)
    with working(f"loading {path}"):
        model, params = load(reader, dtype, experts, expert_cache)
    with progress("evaluating", "samples") as advance:
        result = qj.evaluate(
            model,
            params,
            examples,
            batch_size=batch_size,
            progress=lambda done, total, label: advance(done, total),
        )
    seconds = time.monotonic() - began
    fields = {
        "path": path,
        "format": reader.format,
        "dtype": model.dtype,
        "samples": len(examples),
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "accuracy": result.accuracy,
        "seconds": seconds,
        "experts": None if (used := qj.expert_statistics(params)) is None else used.to_json(),
    }
    table = Table.grid(padding=(0, 2))
    table.add_row("loss", f"{result.loss:.4f} nats a token")
    table.add_row("perplexity", f"{result.perplexity:.2f}")
    table.add_row("accuracy", f"{result.accuracy:.2%} of the tokens most likely")
    table.add_row("tokens", f"{result.tokens:,} in {len(examples):,} samples")
    table.add_row("seconds", f"{seconds:.1f}, loading and compilation included")
    return Answer(fields, (table,))
