"""Text files, the tokenizer's sentinels, batches."""

import gzip
import json
import lzma

import numpy as np
import pytest
import sentencepiece

from qmoe_jax.data import TextError, Tokenizer, batches, read_documents, segments, short_texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = ["the cat sat on the mat", "a dog ran after the cat", "we saw the dog and the cat run"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "spiece"), vocab_size=40, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return Tokenizer(folder / "spiece.model")


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_documents_of_json_lines(tmp_path, suffix, opener):
    path = tmp_path / f"texts.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"text": text, "split": s}) + "\n" for text, s in [("one", "a"), ("two", "b")]
        )
    assert list(read_documents(path)) == ["one", "two"]
    assert list(read_documents(tmp_path, split="b")) == ["two"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond")
    assert list(read_documents(tmp_path)) == ["first\n\nsecond"]


def test_a_folder_without_text_is_named(tmp_path):
    with pytest.raises(TextError, match=f"{tmp_path}: no text found"):
        list(read_documents(tmp_path))


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"body": "not"}\n')
    with pytest.raises(TextError, match=r"bad\.jsonl, line 2"):
        list(read_documents(path))


def test_sentinels_lie_above_the_pieces(tokenizer):
    assert tokenizer.sentinels.count == 100
    assert tokenizer.sentinels.start == tokenizer.pieces.get_piece_size()
    assert tokenizer.sentinels.id(0) == tokenizer.vocab_size - 1


def test_decoding_names_sentinels_and_stops_at_the_end(tokenizer):
    cat = tokenizer.encode("the cat").tolist()
    ids = [0, tokenizer.sentinels.id(0), *cat, tokenizer.sentinels.id(1), 1, *cat]
    assert tokenizer.decode(ids) == "<extra_id_0> the cat <extra_id_1>"


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(TextError, match="no sentencepiece model there"):
        Tokenizer(tmp_path / "spiece.model")


def test_segments_and_short_texts(tokenizer):
    document = "the cat sat on the mat " * 10
    tokens = tokenizer.encode(document)
    pieces = segments([document], tokenizer, 16)
    np.testing.assert_array_equal(np.concatenate(pieces), tokens[: sum(map(len, pieces))])
    assert all(len(piece) == 16 for piece in pieces[:-1])
    assert len(short_texts([document, "the cat"], tokenizer, limit=16)) == 1


def test_batches_have_one_shape_and_lose_nothing():
    generator = np.random.default_rng(0)
    examples = [
        (generator.integers(1, 9, n).astype(np.int32), generator.integers(1, 9, m).astype(np.int32))
        for n, m in [(3, 2), (17, 5), (4, 9), (8, 2), (1, 3)]
    ]
    rows = list(batches(examples, 2))
    assert {(b.encoder.shape, b.decoder.shape) for b in rows} == {((2, 32), (2, 16))}
    for number, (encoder, decoder) in enumerate(examples):
        batch = rows[number // 2]
        assert batch.start == 2 * (number // 2)
        np.testing.assert_array_equal(batch.encoder[number % 2, : len(encoder)], encoder)
        np.testing.assert_array_equal(batch.decoder[number % 2, : batch.lengths[number % 2]], decoder)
    assert rows[-1].lengths[1] == 0


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "bad.jsonl.xz"
    path.write_bytes(b"no archive at all")
    with pytest.raises(TextError, match=r"bad\.jsonl\.xz: is damaged"):
        list(read_documents(path))


def test_ids_beyond_the_sentinels_mean_nothing(tokenizer):
    cat = tokenizer.encode("the cat").tolist()
    assert tokenizer.decode([*cat, tokenizer.vocab_size + 5]) == "the cat"
