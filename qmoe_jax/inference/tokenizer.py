"""Loads the tokenizer that belongs to a checkpoint."""

from __future__ import annotations

import os

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.data.errors import TextError
from qmoe_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer, find_tokenizer


def load_tokenizer(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    path: str | os.PathLike[str] | None = None,
    *,
    extra_ids: int | None = None,
) -> Tokenizer:
    """Load a checkpoint's tokenizer, check that it fits the model, and give it the model's token ids.

    Args:
        checkpoint: a checkpoint of any format, by path or opened.
        path: the sentencepiece model; by default tokenizer.model or spiece.model in the checkpoint's
            directory or the one above. Artifacts carry theirs.
        extra_ids: number of sentinels; by default as many as the tokenizer's files name, else T5's 100 above
            its pieces.

    Warns:
        UserWarning: the model has many more ids than the tokenizer.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        TextError: no tokenizer is found, it has more ids than the model, or its padding or end token has
            another id.
    """
    reader = open_checkpoint(checkpoint)
    found = path or find_tokenizer(reader.path)
    if found is None:
        raise TextError(
            "has no tokenizer",
            path=reader.path,
            expected=f"{' or '.join(TOKENIZER_FILES)} there, or in the directory above",
            remedy="pass the tokenizer's file",
        )
    tokenizer = Tokenizer(found, extra_ids, reader.config.token_ids)
    tokenizer.check_model(reader.config)
    tokenizer.warn_of_fewer_ids(reader.config.vocab_size)
    return tokenizer
