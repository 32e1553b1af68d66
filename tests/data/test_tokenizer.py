"""The tokenizer: its sentinels, its place beside a checkpoint, and the vocabulary that it fits."""

import dataclasses
import shutil

import pytest

import qmoe_jax as qj
from qmoe_jax.config import SwitchConfig, TokenIds
from qmoe_jax.data import TextError, Tokenizer, find_tokenizer
from tests.helpers.tokenizers import train_tokenizer


def test_sentinels_are_above_the_pieces(tokenizer):
    assert tokenizer.sentinels.count == 100
    assert tokenizer.sentinels.start == tokenizer.model.get_piece_size()
    assert tokenizer.sentinels.id(0) == tokenizer.vocab_size - 1


def test_decoding_names_sentinels_and_stops_at_the_end_token(tokenizer):
    cat = tokenizer.encode("the cat").tolist()
    ids = [0, tokenizer.sentinels.id(0), *cat, tokenizer.sentinels.id(1), 1, *cat]
    assert tokenizer.decode(ids) == "<extra_id_0> the cat <extra_id_1>"


def test_decoding_leaves_out_ids_above_the_sentinels(tokenizer):
    cat = tokenizer.encode("the cat").tolist()
    assert tokenizer.decode([*cat, tokenizer.vocab_size + 5]) == "the cat"


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_tokenizer_is_found_in_the_checkpoints_folder_or_above(tokenizer, tmp_path, name):
    checkpoint = tmp_path / "model" / "checkpoint_1000"
    checkpoint.mkdir(parents=True)
    assert find_tokenizer(checkpoint) is None
    shutil.copyfile(tokenizer.path, checkpoint.parent / name)
    assert find_tokenizer(checkpoint) == find_tokenizer(checkpoint.parent) == checkpoint.parent / name
    assert Tokenizer(checkpoint).vocab_size == tokenizer.vocab_size


def test_no_tokenizer_is_found_beside_a_url():
    assert find_tokenizer("gs://bucket/checkpoint_1000") is None


def test_a_missing_tokenizer_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "spiece.model"):
        with pytest.raises(TextError, match=f"{path}: no sentencepiece model there"):
            Tokenizer(path)


def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(TextError, match=r"bad\.model: is not a sentencepiece model"):
        Tokenizer(tmp_path / "bad.model")


def model_of(tokenizer: Tokenizer, **fields: int) -> SwitchConfig:
    return dataclasses.replace(qj.PRESETS["switch-base-8"], **{"vocab_size": tokenizer.vocab_size, **fields})


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer):
    tokenizer.check_model(model_of(tokenizer))
    with pytest.raises(TextError, match=f"more ids .*\n  expected: at most {tokenizer.vocab_size - 1}"):
        tokenizer.check_model(model_of(tokenizer, vocab_size=tokenizer.vocab_size - 1))


@pytest.mark.parametrize(("field", "key"), [("pad_id", "pad_token_id"), ("eos_id", "eos_token_id")])
def test_a_tokenizer_that_disagrees_about_a_token_is_refused(tokenizer, field, key):
    own = getattr(model_of(tokenizer), field)
    with pytest.raises(TextError, match=f"key: {key}\n  expected: 5, the model's\n  found: {own}, the "):
        tokenizer.check_model(model_of(tokenizer, **{field: 5}))


def test_a_tokenizer_without_padding_has_no_text_where_the_model_has_it(tmp_path):
    """Sentencepiece's own defaults: no padding, 0 unknown, 2 the end."""
    path = train_tokenizer(
        tmp_path / "m.model", ["the cat sat"] * 9, 20, pad_id=-1, unk_id=0, bos_id=1, eos_id=2
    )
    tokenizer = Tokenizer(path)
    assert tokenizer.token_ids == TokenIds(pad=0, eos=2, decoder_start=0)
    tokenizer.check_model(model_of(tokenizer, eos_id=2))
    expected = "key: pad_token_id\n  expected: an id without text as 5, the model's\n  found: the piece"
    with pytest.raises(TextError, match=expected):
        tokenizer.check_model(model_of(tokenizer, eos_id=2, pad_id=5))


def test_a_model_with_many_more_ids_than_the_tokenizer_gives_a_warning(tokenizer):
    tokenizer.warn_of_fewer_ids(tokenizer.vocab_size + 127)
    with pytest.warns(UserWarning, match="check that it was trained with them"):
        tokenizer.warn_of_fewer_ids(tokenizer.vocab_size + 128)


def test_a_tokenizer_on_a_path_that_is_not_utf8_is_read(tokenizer, tmp_path):
    path = tmp_path / "caf\udce9.model"
    path.write_bytes(tokenizer.path.read_bytes())
    assert Tokenizer(path).pieces == tokenizer.pieces
