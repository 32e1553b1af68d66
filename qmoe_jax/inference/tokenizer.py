"""Loads the tokenizer that belongs to a checkpoint."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.data.errors import TextError
from qmoe_jax.data.sentinels import CONFIG_FILE
from qmoe_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer, find_tokenizer
from qmoe_jax.files.durable import record_of_pieces
from qmoe_jax.files.errors import CheckpointError


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
    found = path or tokenizer_file(reader)
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


def tokenizer_file(checkpoint: Checkpoint) -> Path | None:
    """Return the sentencepiece model that belongs to a checkpoint, as a local file; None where there is none.

    The one that an artifact in an object store carries is copied, with the file that names its sentinels, to
    a temporary folder, which is removed when the process ends.

    Raises:
        CheckpointError: an artifact's file is missing, or not the one that its manifest lists.
    """
    if isinstance(checkpoint.path, Path) or not isinstance(checkpoint, ArtifactReader):
        return find_tokenizer(checkpoint.path)
    carried = [name for name in (*TOKENIZER_FILES, CONFIG_FILE) if name in checkpoint.manifest.files]
    if not set(carried).intersection(TOKENIZER_FILES):
        return None
    folder = Path(tempfile.mkdtemp(prefix="qmoe-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in carried:
        content, expected = checkpoint.store.read(name), checkpoint.manifest.files[name]
        if (found := record_of_pieces([content])) != expected:
            path = checkpoint.store.path(name)
            raise CheckpointError("is damaged", path=path, expected=expected, found=found)
        (folder / name).write_bytes(content)
    return find_tokenizer(folder)
