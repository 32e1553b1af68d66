"""qmoe evaluate: measures the loss of a model on held-out text."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.table import Table

import qmoe_jax as qj
from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import working
from qmoe_jax.cli.models import CheckpointPath, Devices, Dtype, ExpertCache, Experts, load, open_model
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
from qmoe_jax.distributed import mesh_of


def evaluate(
    path: CheckpointPath,
    text: HeldOutText,
    tokenizer: TokenizerFile = None,
    extra_ids: ExtraIds = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Number of samples.", show_default="all", rich_help_panel="Text"),
    ] = None,
    max_tokens: MaxTokens = None,
    segment: Segment = None,
    split: Split = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of samples that run together.")] = 16,
    dtype: Dtype = None,
    experts: Experts = None,
    expert_cache: ExpertCache = None,
    devices: Devices = None,
) -> Answer:
    """Measure a model's loss on held-out text.

    Spans of each text are masked as in pretraining (15 % of the tokens, 3 per
    span on average), and the model predicts them. The loss is the mean
    cross-entropy per token in nats. The experts of a compressed model stay
    packed.

    Examples:
        $ qmoe evaluate mini-ternary --text validation.jsonl.xz --segment 127
        $ qmoe evaluate switch-base-128 --text c4-validation.json.gz --samples 128
        $ qmoe evaluate c2048-ternary --text c4-validation.json.gz --devices 8 --batch-size 64
        $ qmoe evaluate mini-ternary --text books/ --segment 127 --json | jq .loss
    """
    began, options = time.monotonic(), SampleOptions(samples, max_tokens, segment, split, seed)
    with working(f"reading {path} and the text"):
        checkpoint = open_model(path)
        examples = options.read(text, load_tokenizer(checkpoint, tokenizer, extra_ids))
    with working(f"loading {path}"):
        model, params = load(checkpoint, dtype, experts, expert_cache, devices)
    with qj.ProgressBar("evaluating", "samples") as progress:
        result = qj.evaluate(model, params, examples, batch_size=batch_size, progress=progress)
    seconds, statistics = time.monotonic() - began, qj.expert_statistics(params)
    mesh = mesh_of(params)
    fields = {
        "path": path,
        "format": checkpoint.format,
        "dtype": model.dtype,
        "samples": len(examples),
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "accuracy": result.accuracy,
        "seconds": seconds,
        "devices": 1 if mesh is None else mesh.size,
        "experts": None if statistics is None else statistics.to_json(),
    }
    table = Table.grid(padding=(0, 2))
    table.add_row("loss", f"{result.loss:.4f} nats per token")
    table.add_row("perplexity", f"{result.perplexity:.2f}")
    table.add_row("accuracy", f"{result.accuracy:.2%} of tokens predicted correctly")
    table.add_row("tokens", f"{result.tokens:,} in {len(examples):,} samples")
    table.add_row("seconds", f"{seconds:.1f}, including loading and compilation")
    return Answer(fields, (table,))
