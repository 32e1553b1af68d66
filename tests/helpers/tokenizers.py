"""Small sentencepiece models, trained in a moment."""

import pathlib
from collections.abc import Iterable

import sentencepiece


def train_tokenizer(path: pathlib.Path, texts: Iterable[str], vocab_size: int) -> pathlib.Path:
    """Train a tokenizer with T5's special ids on `texts`, of at most `vocab_size` pieces; returns `path`."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), vocab_size=vocab_size,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return path
