"""qmoe bench: how fast is a model on this machine?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import progress, working
from qmoe_jax.cli.models import Checkpoint, Dtype, ExpertCache, Experts, load

if TYPE_CHECKING:
    from qmoe_jax.evaluation.throughput import Throughput


def bench(
    path: Checkpoint,
    batch_size: Annotated[
        list[int], typer.Option(min=1, help="Prompts that run together. May be repeated.")
    ] = [1, 8],  # noqa: B006 (typer reads it, nobody writes it)
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, drawn evenly.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write to each.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Times each is run; every one is told.")] = 2,
    dtype: Dtype = None,
    experts: Experts = None,
    expert_cache: ExpertCache = None,
) -> Answer:
    """Measure how fast a model reads prompts and writes tokens here.

    Prompts are random tokens, and so are the tokens written (drawn at
    temperature 1), so that routing does not repeat itself. Compilation is not
    counted. With experts on the host or on disk it is told where the time
    goes: waiting for experts to be read, multiplying them, all else.

    Examples:
      $ qmoe bench mini-ternary
      $ qmoe bench c2048-ternary --experts disk --expert-cache 4GB --batch-size 1
      $ qmoe bench base-ternary --json | jq '.runs[].writing.tokens_per_second'
    """
    import jax
    import numpy as np

    import qmoe_jax as qj
    from qmoe_jax.evaluation.throughput import Generator

    began = time.monotonic()
    with working(f"loading {path}"):
        reader = qj.open_checkpoint(path)
        model, params = load(reader, dtype, experts, expert_cache)
    loading, runs = time.monotonic() - began, []
    with progress("running", "rounds") as advance:
        for batch in batch_size:
            generator = Generator(model, params, (batch, prompt), new_tokens)
            for seed in range(rounds):
                generate = np.random.default_rng(seed)
                prompts = generate.integers(2, reader.config.vocab_size, generator.shape, np.int32)
                runs.append((seed, generator.measure(prompts)))
                advance(len(runs), rounds * len(batch_size))
    used = qj.expert_statistics(params)
    fields = {
        "path": path,
        "device": jax.devices()[0].device_kind,
        "dtype": model.dtype,
        "experts": "device" if used is None else used.placement,
        "loading_seconds": loading,
        "prompt_tokens": prompt,
        "new_tokens": new_tokens,
        "runs": [_as_json(seed, found) for seed, found in runs],
    }
    return Answer(fields, (_table(runs, f"experts on {fields['experts']}, {fields['device']}"),))


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
