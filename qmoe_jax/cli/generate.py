"""qmoe generate: fill the blanks of a text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import progress, stderr, working
from qmoe_jax.cli.models import Checkpoint, Dtype, ExpertCache, Experts, load
from qmoe_jax.cli.samples import ExtraIds, TokenizerFile, check_vocabulary, open_tokenizer

if TYPE_CHECKING:
    import numpy as np

    from qmoe_jax.inference import Sampling
    from qmoe_jax.models import SwitchTransformer

LENGTH_MULTIPLE = 16
"""Texts are padded to a multiple of this many tokens, so that near lengths share one compiled program."""


def generate(
    path: Checkpoint,
    text: Annotated[
        str | None,
        typer.Argument(
            help="A text with blanks: ___ or T5's <extra_id_0>, <extra_id_1>, ...", show_default=False
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Texts to fill instead, one a line.", show_default=False)
    ] = None,
    tokenizer: TokenizerFile = None,
    extra_ids: ExtraIds = 100,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to write at most, for all blanks of a text.")
    ] = 32,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="0 takes the most likely token each time; 1 draws tokens as the model weighs them.",
            show_default="0, or 1 with --top-k or --top-p",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Draw from this many of the likeliest tokens.", show_default="all"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Draw from the likeliest tokens that have this share together.",
            show_default="all",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Lines of --file that are filled together.")] = 8,
    dtype: Dtype = None,
    experts: Experts = None,
    expert_cache: ExpertCache = None,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Tell times, tokens a second and what was read of experts, on stderr."),
    ] = False,
) -> Answer:
    """Fill the blanks of a text, and print it filled.

    Experts of a compressed model stay packed while it runs.

    Examples:
      $ qmoe generate mini-ternary "The ___ sat on the mat."
      $ qmoe generate switch-base-8 "A <extra_id_0> day." --top-p 0.9 --seed 1
      $ qmoe generate mini-ternary --file lines.txt --stats > filled.txt
      $ qmoe generate c2048-ternary "Paris is the ___." --experts disk --expert-cache 4GB
    """
    import qmoe_jax as qj
    from qmoe_jax.data.infill import Infill, read_spans

    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None else 1.0
    sampling = qj.Sampling(temperature, top_k, top_p)
    infills = [Infill.parse(line) for line in _lines(text, file)]
    began = time.monotonic()
    with working(f"loading {path}"):
        reader = qj.open_checkpoint(path)
        pieces = open_tokenizer(path, tokenizer, extra_ids)
        check_vocabulary(pieces, reader.config.vocab_size)
        encoded = [infill.encode(pieces) for infill in infills]
        model, params = load(reader, dtype, experts, expert_cache)
    loading = time.monotonic() - began
    outputs, batches = _write(model, params, encoded, batch_size, max_new_tokens, sampling, seed)
    spans = [read_spans(ids, pieces.sentinels) for ids in outputs]
    filled = [infill.fill(span, pieces) for infill, span in zip(infills, spans, strict=True)]
    timing = Timing(loading, batches)
    used = qj.expert_statistics(params)
    if stats:
        for line in (timing, used):
            if line is not None:
                stderr().print(str(line), soft_wrap=True)
    texts = [
        {"filled": result, "spans": {n: pieces.decode(ids) for n, ids in span.items()}}
        for result, span in zip(filled, spans, strict=True)
    ]
    stated = timing.to_json() | {"experts": None if used is None else used.to_json()}
    return Answer({"texts": texts, "stats": stated}, tuple(filled))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds that loading took, and for each batch (the first with its compilation) tokens written and seconds."""

    loading: float
    batches: list[tuple[int, float]]

    def to_json(self) -> dict[str, float | int | None]:
        """The rate is that of the batches behind the first; None where there is none."""
        tokens, seconds = map(sum, zip(*self.batches, strict=True))
        first_tokens, first_seconds = self.batches[0]
        later = len(self.batches) > 1
        return {
            "tokens": tokens,
            "loading_seconds": self.loading,
            "first_batch_seconds": first_seconds,
            "seconds": seconds,
            "tokens_per_second": (tokens - first_tokens) / (seconds - first_seconds) if later else None,
        }

    def __str__(self) -> str:
        """One line for people."""
        found = self.to_json()
        rate = found["tokens_per_second"]
        later = f", then {rate:,.0f} tokens/s" if rate else ""
        return (
            f"loaded in {self.loading:.1f} s; {found['tokens']:,} tokens in {found['seconds']:.2f} s: the first batch, "
            f"compilation included, {found['first_batch_seconds']:.2f} s{later}"
        )


def _write(
    model: SwitchTransformer,
    params: dict[str, Any],
    encoded: Sequence[np.ndarray],
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> tuple[list[np.ndarray], list[tuple[int, float]]]:
    """What the model writes for each text, int32 `[new]`; and tokens and seconds of each batch."""
    import numpy as np
    from jax import numpy as jnp

    from qmoe_jax.inference import generate as write

    outputs: list[np.ndarray] = []
    batches: list[tuple[int, float]] = []
    with progress("filling", "texts") as advance:
        for number, rows in enumerate(_batches(encoded, batch_size)):
            began = time.monotonic()
            # Another seed for every batch, so that equal lines of two batches are drawn apart.
            ids = write(
                model, params, jnp.asarray(rows), max_new_tokens=max_new_tokens, sampling=sampling,
                seed=seed + number,
            )  # fmt: skip
            new = list(np.asarray(ids))[: len(encoded) - len(outputs)]
            batches.append((int(np.count_nonzero(new)), time.monotonic() - began))
            outputs += new
            advance(len(outputs), len(encoded))
    return outputs, batches


def _lines(text: str | None, file: Path | None) -> list[str]:
    """The text of the command line, or the lines of a file that are not empty."""
    if (text is None) == (file is None):
        raise typer.BadParameter("give a text with blanks, or --file with one a line")
    if text is not None:
        return [text]
    assert file is not None
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file}: no line of text")
    return lines


def _batches(encoded: Sequence[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Encoder ids as batches of one shape, int32 `[row, n]`; the last row is repeated to fill the last batch."""
    from qmoe_jax.data.batching import pad_rows, round_up

    rows = min(batch_size, len(encoded))
    length = round_up(max(map(len, encoded)), LENGTH_MULTIPLE)
    for start in range(0, len(encoded), rows):
        part = list(encoded[start : start + rows])
        yield pad_rows(part + part[-1:] * (rows - len(part)), rows, length)
