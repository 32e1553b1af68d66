"""From text files to span-corrupted samples: the options that several commands share, and what they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmoe_jax.cli.console import warn

if TYPE_CHECKING:
    from qmoe_jax.data import Example, Tokenizer

TOKENIZERS = ("tokenizer.model", "spiece.model")
"""What a sentencepiece model is called beside a checkpoint."""

PADDING = 128
"""Models pad their vocabulary to a multiple of this; a wider gap to the tokenizer's is worth a warning."""

UPSTREAM_MAX_TOKENS = 568

TokenizerFile = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="MODEL",
        help="The sentencepiece model.",
        show_default=f"{' or '.join(TOKENIZERS)} in the checkpoint's directory or the one above",
        rich_help_panel="Text",
    ),
]
ExtraIds = Annotated[
    int,
    typer.Option(
        min=1,
        help="Sentinel ids above the tokenizer's pieces: 100 in T5's vocabularies.",
        rich_help_panel="Text",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=3,
        metavar="TOKENS",
        help="Skip texts of this many tokens or more, as QMoE does for C4.",
        show_default=f"{UPSTREAM_MAX_TOKENS}, unless --segment is given",
        rich_help_panel="Text",
    ),
]
Segment = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="TOKENS",
        help="Instead of skipping long texts, cut every text into pieces of this many tokens.",
        rich_help_panel="Text",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help='Take only the JSON lines whose "split" is this.', rich_help_panel="Text"
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the spans that are masked.", rich_help_panel="Text")]


@dataclasses.dataclass(frozen=True)
class SampleRules:
    """How texts become samples: `samples` at most, of texts skipped or cut by their length in tokens."""

    samples: int | None
    max_tokens: int | None
    segment: int | None
    split: str | None
    seed: int

    def __post_init__(self) -> None:
        """Refuse two answers to one question."""
        if self.max_tokens and self.segment:
            raise typer.BadParameter(
                "--max-tokens skips long texts and --segment cuts them: give one of the two"
            )


def open_tokenizer(checkpoint: str, given: Path | None, extra_ids: int) -> Tokenizer:
    """The tokenizer that was given, or the one that lies with the checkpoint.

    Raises:
      TextError: there is none, or it is no sentencepiece model.
    """
    from qmoe_jax.data import TextError, Tokenizer

    path = given or find_tokenizer(checkpoint)
    if path is None:
        raise TextError(f"{checkpoint}: no {' or '.join(TOKENIZERS)} there or above; pass it by --tokenizer")
    try:
        return Tokenizer(path, extra_ids)
    except RuntimeError as error:  # sentencepiece's only kind of error
        raise TextError(f"{path}: expected a sentencepiece model; {error}") from error


def find_tokenizer(checkpoint: str) -> Path | None:
    """The sentencepiece model in a local checkpoint's directory or, as T5X has them, in the one above."""
    folder = Path(checkpoint).expanduser()
    if not folder.exists():
        return None
    candidates = (place / name for place in (folder, folder.resolve().parent) for name in TOKENIZERS)
    return next((path for path in candidates if path.is_file()), None)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that makes ids the model does not have; warn of one that leaves many unused.

    Raises:
      TextError: it has more ids than the model.
    """
    from qmoe_jax.data import TextError

    pieces, ids = tokenizer.sentinels.start, tokenizer.vocab_size
    if ids > vocab_size:
        raise TextError(
            f"{tokenizer.path}: expected at most {vocab_size} ids, the model's vocabulary, found {ids}: {pieces} "
            f"pieces and {tokenizer.sentinels.count} sentinels; pass the tokenizer the model was trained with, "
            "or the number of its sentinels by --extra-ids"
        )
    if vocab_size - ids >= PADDING:
        warn(
            f"{tokenizer.path} has {ids} ids ({pieces} pieces and {tokenizer.sentinels.count} sentinels), the model "
            f"{vocab_size}: is it the one the model was trained with?"
        )


def read_samples(files: Sequence[Path], tokenizer: Tokenizer, rules: SampleRules) -> list[Example]:
    """Span-corrupted samples of text files or folders: the first texts that are short enough, or pieces of all texts.

    Pieces are taken evenly from all documents where there are more than `rules.samples`.

    Raises:
      TextError: a file cannot be read, or no text is left.
    """
    from qmoe_jax.data import TextError, read_documents, segments, short_texts, span_corruption
    from qmoe_jax.data.text import text_files

    for file in files:
        text_files(file)  # refuses a path without text now, and not when the texts before it have been read
    documents = (text for file in files for text in read_documents(file, rules.split))
    if rules.segment:
        texts = segments(documents, tokenizer, rules.segment)
        texts = texts[:: max(1, -(-len(texts) // (rules.samples or len(texts) or 1)))]
        rule = f"of at least {-(-rules.segment // 2)} tokens, half of --segment"
    else:
        limit = rules.max_tokens or UPSTREAM_MAX_TOKENS
        texts = short_texts(documents, tokenizer, limit, rules.samples)
        rule = f"of under {limit} tokens; cut longer ones by --segment {limit - 56}"
    if not texts:
        names = ", ".join(map(str, files))
        of_split = f' with "split": "{rules.split}"' if rules.split else ""
        raise TextError(f"{names}: no text{of_split} {rule}")
    return span_corruption(texts, tokenizer.sentinels, rules.seed)
