"""qmoe generate: fills the blanks of texts."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Annotated

import typer

import qmoe_jax as qj
from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import Verbatim, stderr, working
from qmoe_jax.cli.lines import Line, argument_line, file_lines
from qmoe_jax.cli.models import CheckpointPath, Devices, Dtype, ExpertCache, Experts, load, open_model
from qmoe_jax.cli.samples import ExtraIds, TokenizerFile, load_tokenizer
from qmoe_jax.data.infill import Infill
from qmoe_jax.data.seed import check_seed


def generate(
    path: CheckpointPath,
    text: Annotated[
        str | None,
        typer.Argument(
            help="A text with blanks: ___ or T5's <extra_id_0>, <extra_id_1>, ...", show_default=False
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Fill the texts of this file instead, one per line, or of standard input (-). Blank lines "
            "are left out.",
            show_default=False,
        ),
    ] = None,
    tokenizer: TokenizerFile = None,
    extra_ids: ExtraIds = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens to generate, for all blanks of a text.")
    ] = 32,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Sampling temperature; 0 takes the most likely token (greedy).",
            show_default="0, or 1 with --top-k or --top-p",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Sample from this many most likely tokens.", show_default="all"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Sample from the most likely tokens whose total probability is this.",
            show_default="all",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of lines of --file that run together.")] = 8,
    dtype: Dtype = None,
    experts: Experts = None,
    expert_cache: ExpertCache = None,
    devices: Devices = None,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Print timing, tokens per second and expert I/O statistics to stderr."),
    ] = False,
) -> Answer:
    """Fill the blanks of a text, and print the result.

    The experts of a compressed model stay packed.

    Around its blanks a text goes out as it came in, in UTF-8; only a terminal
    is shown control characters as escapes. With --file each text is one line,
    with the line ending that it had: a line break that the model writes is
    printed as a space, and given as it is by --json.

    Examples:
        $ qmoe generate mini-ternary "The ___ sat on the mat."
        $ qmoe generate switch-base-8 "A <extra_id_0> day." --top-p 0.9 --seed 1
        $ qmoe generate mini-ternary --file lines.txt --stats > filled.txt
        $ grep ___ notes.txt | qmoe generate mini-ternary --file - --json
        $ qmoe generate c2048-ternary "Paris is the ___." --experts disk --expert-cache 4GB
    """
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise typer.BadParameter(
            "--temperature 0 takes the most likely token: --top-k and --top-p do not apply to it"
        )
    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None else 1.0
    seed = check_seed(seed)
    sampling, lines, clock = qj.Sampling(temperature, top_k, top_p), _lines(text, file), Stopwatch()
    with working(f"loading {path}"):
        checkpoint = open_model(path)
        pieces = load_tokenizer(checkpoint, tokenizer, extra_ids)
        for line in lines:  # refuses a bad text before the model is loaded
            try:
                Infill.parse(line.text).encode(pieces)
            except ValueError as error:
                raise ValueError(f"{line.place}{error}") from error
        model, params = load(checkpoint, dtype, experts, expert_cache, devices)
    with qj.ProgressBar("filling", "texts") as progress:
        filled = qj.fill_blanks(
            model, params, pieces, [line.text for line in lines], max_new_tokens=max_new_tokens,
            sampling=sampling, seed=seed, batch_size=batch_size, progress=clock.forwarding_to(progress),
        )  # fmt: skip
    timing, statistics = clock.timing(filled), qj.expert_statistics(params)
    if stats:
        for found in (timing, statistics):
            if found is not None:
                stderr().print(str(found), soft_wrap=True)
    fields = {
        "texts": [{"filled": each.text, "spans": each.spans} for each in filled],
        "stats": timing.to_json() | {"experts": None if statistics is None else statistics.to_json()},
    }
    printed = [
        Verbatim((each.text if file is None else each.text.replace("\n", " ")) + line.ending)
        for each, line in zip(filled, lines, strict=True)
    ]
    return Answer(fields, tuple(printed))


class Stopwatch:
    """Times of loading and of each batch, taken when progress is reported; the first report ends loading."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._calls: list[tuple[int, float]] = []

    def forwarding_to(self, progress: qj.ProgressCallback) -> qj.ProgressCallback:
        """Return a progress callback that notes the time and calls `progress`."""

        def report(done: int, total: int, label: str) -> None:
            self._calls.append((done, time.monotonic()))
            progress(done, total, label)

        return report

    def timing(self, filled: list[qj.FilledText]) -> Timing:
        """Return the times, with the tokens of the texts that each batch filled."""
        batches = [
            (sum(each.tokens for each in filled[first:last]), end - begin)
            for (first, begin), (last, end) in itertools.pairwise(self._calls)
        ]
        return Timing(self._calls[0][1] - self._began, batches)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Durations of a run.

    Attributes:
        loading: seconds that loading took.
        batches: tokens generated and seconds of each batch; the first includes compilation.
    """

    loading: float
    batches: list[tuple[int, float]]

    def to_json(self) -> dict[str, float | int | None]:
        """Return plain values. The rate is that of the batches after the first; None if there is only one."""
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
        """Return one line for people."""
        found = self.to_json()
        rate = found["tokens_per_second"]
        later = f", then {rate:,.0f} tokens/s" if rate else ""
        return (
            f"loaded in {self.loading:.1f} s; {found['tokens']:,} tokens in {found['seconds']:.2f} s: "
            f"first batch {found['first_batch_seconds']:.2f} s including compilation{later}"
        )


def _lines(text: str | None, file: Path | None) -> list[Line]:
    """Return the text of the command line, or the lines of a file that are not blank."""
    if (text is None) == (file is None):
        raise typer.BadParameter("give either a text with blanks, or --file with one text per line")
    if text is not None:
        return [argument_line(text)]
    assert file is not None
    return file_lines(file)
