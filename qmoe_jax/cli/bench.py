"""qmoe bench: measures the throughput of a model on this machine."""

from __future__ import annotations

import time
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.table import Table

import qmoe_jax as qj
from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import working
from qmoe_jax.cli.models import CheckpointPath, Devices, Dtype, ExpertCache, Experts, load, open_model
from qmoe_jax.distributed import mesh_of
from qmoe_jax.evaluation.throughput import Generator, Throughput


def bench(
    path: CheckpointPath,
    batch_size: Annotated[
        list[int], typer.Option(min=1, help="Number of prompts that run together. Can be repeated.")
    ] = [1, 8],  # noqa: B006 (typer reads it, nobody writes it)
    prompt: Annotated[int, typer.Option(min=1, help="Prompt length in tokens (uniform random ids).")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; each is reported.")] = 2,
    dtype: Dtype = None,
    experts: Experts = None,
    expert_cache: ExpertCache = None,
    devices: Devices = None,
) -> Answer:
    """Measure how fast a model reads prompts and generates tokens here.

    Prompts are random tokens, and tokens are sampled at temperature 1, so that
    routing does not repeat itself. Compilation is not counted. With experts on
    the host or on disk, the time per token is broken down into waiting for
    reads, multiplying experts, and all other work.

    Examples:
        $ qmoe bench mini-ternary
        $ qmoe bench c2048-ternary --experts disk --expert-cache 4GB --batch-size 1
        $ qmoe bench c2048-ternary --devices 8 --batch-size 64
        $ qmoe bench base-ternary --json | jq '.runs[].writing.tokens_per_second'
    """
    began = time.monotonic()
    with working(f"loading {path}"):
        checkpoint = open_model(path)
        model, params = load(checkpoint, dtype, experts, expert_cache, devices)
    loading = time.monotonic() - began
    runs: list[tuple[int, Throughput]] = []
    with qj.ProgressBar("measuring", "rounds") as progress:
        for batch in batch_size:
            generator = Generator(model, params, (batch, prompt), new_tokens)
            for seed in range(rounds):
                progress(len(runs), rounds * len(batch_size), f"batch {batch}")
                drawn = np.random.default_rng(seed)
                prompts = drawn.integers(2, checkpoint.config.vocab_size, generator.shape, np.int32)
                runs.append((seed, generator.measure(prompts)))
    statistics, mesh = qj.expert_statistics(params), mesh_of(params)
    fields = {
        "path": path,
        "device": jax.devices()[0].device_kind,
        "devices": 1 if mesh is None else mesh.size,
        "dtype": model.dtype,
        "experts": "device" if statistics is None else statistics.placement,
        "loading_seconds": loading,
        "prompt_tokens": prompt,
        "new_tokens": new_tokens,
        "runs": [_as_json(seed, found) for seed, found in runs],
    }
    where = fields["device"] if mesh is None else f"{mesh.size} x {fields['device']}"
    return Answer(fields, (_table(runs, f"experts on {fields['experts']}, {where}"),))


def _as_json(seed: int, found: Throughput) -> dict[str, Any]:
    phases = {"reading": found.reading.to_json(), "writing": found.writing.to_json()}
    return {"batch": found.batch, "round": seed + 1, **phases}


def _table(runs: list[tuple[int, Throughput]], title: str) -> Table:
    stored = runs[0][1].writing.experts is not None
    columns = ["batch", "round", "tokens/s", "prompt tokens/s"]
    columns += ["MB read/token", "ms/token: I/O wait", "experts", "other"] if stored else []
    table = Table(*columns, title=title)
    for column in table.columns:
        column.justify = "right"
    for seed, found in runs:
        row = [f"{found.batch}", f"{seed + 1}"]
        row += [f"{phase.tokens_per_second:,.1f}" for phase in (found.writing, found.reading)]
        if stored:
            writing = found.writing.to_json()
            row.append(f"{writing['bytes_read_per_token'] / 1e6:,.2f}")
            row += [f"{value:,.2f}" for value in writing["milliseconds_per_token"].values()]
        table.add_row(*row)
    return table
