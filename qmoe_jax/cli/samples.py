"""Options by which several commands take text and a tokenizer, and the API calls that they stand for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import qmoe_jax as qj
from qmoe_jax.cli.console import warn
from qmoe_jax.compression import TokenCounts
from qmoe_jax.data import Example, Tokenizer, samples
from qmoe_jax.data.seed import check_seed
from qmoe_jax.data.text_files import text_files

_panel = "Text"

SMALL_TEXT = 1 << 20
"""Bytes of files up to which a plan reads the text whole (1 MiB)."""

PROBE = 256
"""Documents that stand for all of a larger text in a plan."""

TEXT = ".txt, .jsonl or .parquet (.gz, .bz2, .xz or .zst too), a file, a folder, or - for standard input"
"""The texts that are read, in the help of options."""

HeldOutText = Annotated[
    list[str],
    typer.Option(
        metavar="PATH",
        help=f"Held-out text: {TEXT}. Can be repeated.",
        show_default=False,
        rich_help_panel=_panel,
    ),
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="MODEL",
        help="Sentencepiece model.",
        show_default="tokenizer.model or spiece.model in the checkpoint's directory or the one above",
        rich_help_panel=_panel,
    ),
]
ExtraIds = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of sentinel ids above the tokenizer's pieces, for a model that was trained with another "
        "number than T5's.",
        show_default="those that the tokenizer's files name, else 100",
        rich_help_panel=_panel,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=3,
        metavar="TOKENS",
        help="Skip texts of this many tokens or more, as QMoE does for C4.",
        show_default="568, unless --segment is given",
        rich_help_panel=_panel,
    ),
]
Segment = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="TOKENS",
        help="Cut every text into segments of this many tokens, instead of skipping long texts.",
        rich_help_panel=_panel,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help='Use only the JSON lines whose "split" equals this.', rich_help_panel=_panel
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the masked spans.", rich_help_panel=_panel)]


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """The options by which `qmoe_jax.data.samples` chooses samples.

    Attributes:
        count: samples asked for; None: as many as there are, `at_most` of them.
        max_tokens: see `samples`, as for `segment`, `split` and `seed`.
        at_most: the command's own limit where no number is asked for.
    """

    count: int | None
    max_tokens: int | None
    segment: int | None
    split: str | None
    seed: int
    at_most: int | None = None

    def __post_init__(self) -> None:
        """Refuse options that exclude each other, as wrong usage, and a seed out of range."""
        check_seed(self.seed)
        if self.max_tokens and self.segment:
            raise typer.BadParameter(
                "--max-tokens skips long texts and --segment cuts them: give only one of them"
            )

    def read(self, files: Sequence[str], tokenizer: Tokenizer) -> list[Example]:
        """Return the samples of text files or folders.

        Raises:
            TextError: there are none, or fewer than asked for.
        """
        limit = None if self.count else self.at_most
        return samples(files, tokenizer, **vars(self) | {"at_most": limit})

    def count_tokens(self, files: Sequence[str], tokenizer: Tokenizer) -> TokenCounts:
        """Return the size of the samples: counted in texts of up to `SMALL_TEXT` bytes, else estimated.

        Of segments each is taken to be whole; of documents the first `PROBE` stand for all. The text may then
        turn out to hold fewer samples than asked for.

        Raises:
            TextError: as `read`, as far as the text is read.
        """
        wanted = self.count or self.at_most
        paths = [file.path for name in files for file in text_files(name)]
        small = all(path.is_file() for path in paths) and sum(p.stat().st_size for p in paths) <= SMALL_TEXT
        if wanted is None or small:
            return TokenCounts.of(self.read(files, tokenizer))
        if self.segment:
            return TokenCounts.of_text(wanted, self.segment)
        probed = dataclasses.replace(self, count=None, at_most=min(PROBE, wanted)).read(files, tokenizer)
        return TokenCounts.of(probed).scaled(wanted / PROBE if len(probed) == PROBE else 1.0)


def load_tokenizer(checkpoint: qj.Checkpoint, path: Path | None, extra_ids: int | None) -> Tokenizer:
    """Load the tokenizer at `path`, or the checkpoint's own, and print the API's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer = qj.load_tokenizer(checkpoint, path, extra_ids=extra_ids)
    for warning in caught:
        warn(warning.message)
    return tokenizer
