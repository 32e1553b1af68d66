"""Small sentencepiece models, trained in a moment."""

import pathlib
import random
from collections.abc import Iterable

import sentencepiece
from sentencepiece import sentencepiece_model_pb2


def random_texts(count: int) -> list[str]:
    """Return texts of made-up words, enough for a tokenizer of about 300 pieces; the same every time."""
    drawn = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(drawn.choices(syllables, k=drawn.randint(1, 3))) for _ in range(400)]
    return [" ".join(drawn.choices(words, k=drawn.randint(12, 16))) + "." for _ in range(count)]


T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def train_tokenizer(path: pathlib.Path, texts: Iterable[str], vocab_size: int, **ids: int) -> pathlib.Path:
    """Train a tokenizer on `texts`, of at most `vocab_size` pieces, and return `path`.

    Its special ids are T5's but for those given.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), vocab_size=vocab_size,
        minloglevel=2, hard_vocab_limit=False, **(T5_IDS | ids),
    )  # fmt: skip
    return path


def append_pieces(source: pathlib.Path, target: pathlib.Path, names: Iterable[str]) -> pathlib.Path:
    """Write a tokenizer with more pieces, user-defined ones, as seqio appends sentinels; returns `target`."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(source.read_bytes())
    for name in names:
        model.pieces.add(piece=name, score=0.0, type=model.SentencePiece.USER_DEFINED)
    target.write_bytes(model.SerializeToString())
    return target
