"""Token ids are the checkpoint's: a model whose ids are renumbered does what it did, on every path."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

import qmoe_jax as qj
from qmoe_jax.checkpoints.huggingface import write_huggingface
from qmoe_jax.data import Tokenizer, samples
from tests.helpers.checkpoint_samples import TINY_TIED, memory_checkpoint, random_parameters, rewrite_json
from tests.helpers.tokenizers import random_texts, train_tokenizer

# The new id of each old one: padding 3, the end 4, and words where T5 has these.
RENUMBERED = np.arange(512)
RENUMBERED[:6] = [3, 4, 2, 0, 5, 1]
TEXTS = random_texts(200)
SMALL = dataclasses.replace(
    TINY_TIED,
    num_encoder_layers=1,
    num_decoder_layers=1,
    encoder_sparse_layers=(0,),
    decoder_sparse_layers=(0,),
    vocab_size=len(RENUMBERED),
)
BLANKS = [f"{TEXTS[0]} ___ {TEXTS[1]}", f"___ {TEXTS[2]} <extra_id_3>"]


def renumber(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Write a model and its tokenizer with other ids for the same tokens."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    for key, old in tensors.items():
        if old.shape[0] == 512:
            tensors[key] = np.empty_like(old)
            tensors[key][RENUMBERED] = old
    save_file(tensors, target / "model.safetensors")
    shutil.copyfile(source / "config.json", target / "config.json")
    rewrite_json(target / "config.json", pad_token_id=3, eos_token_id=4, decoder_start_token_id=3)
    pieces = sentencepiece_model_pb2.ModelProto.FromString((source / "spiece.model").read_bytes())
    old_pieces = [type(piece).FromString(piece.SerializeToString()) for piece in pieces.pieces]
    for new, piece in zip(RENUMBERED, old_pieces, strict=False):
        pieces.pieces[new].CopyFrom(piece)
    (target / "spiece.model").write_bytes(pieces.SerializeToString())
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    """A model of one layer per stack, so that it compiles in a moment, with T5's ids."""
    model = tmp_path_factory.mktemp("ids") / "model"
    write_huggingface(memory_checkpoint(SMALL, random_parameters(SMALL, np.dtype(np.float32))), model)
    train_tokenizer(model / "spiece.model", TEXTS, 400)
    (model.parent / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:12])
    )
    return model


@pytest.fixture(scope="module")
def renumbered(model) -> pathlib.Path:
    return renumber(model, model.parent / "renumbered")


def examples_of(model: pathlib.Path) -> list:
    return samples(model.parent / "texts.jsonl", qj.load_tokenizer(model))


def test_samples_have_the_models_ids(model, renumbered):
    for old, new in zip(examples_of(model), examples_of(renumbered), strict=True):
        for mine, theirs in zip(old, new, strict=True):
            assert RENUMBERED[mine].tolist() == theirs.tolist()


def test_losses_are_equal(model, renumbered):
    old, new = (qj.evaluate(*qj.load_model(each), examples_of(each)) for each in (model, renumbered))
    assert new.loss == pytest.approx(old.loss, abs=1e-5)
    assert new.tokens == old.tokens
    compared = qj.compare(renumbered, renumbered, examples_of(renumbered))
    assert compared.original_loss == pytest.approx(old.loss, abs=1e-5)


def test_blanks_are_filled_equally(model, renumbered):
    old, new = (
        qj.fill_blanks(*qj.load_model(each), qj.load_tokenizer(each), BLANKS, max_new_tokens=6)
        for each in (model, renumbered)
    )
    assert new == old


def test_a_compressed_model_keeps_its_ids_and_its_loss(model, renumbered, tmp_path):
    losses = []
    for each in (model, renumbered):
        tokenizer, examples = qj.load_tokenizer(each), examples_of(each)
        config = qj.CompressionConfig(bits=2, method="nearest").with_sentinels(tokenizer)
        output = tmp_path / each.name
        qj.compress(each, output, examples, config, attachments=tokenizer.files())
        assert qj.load_tokenizer(output).token_ids == tokenizer.token_ids
        losses.append(qj.evaluate(*qj.load_compressed(output), examples).loss)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_decoder_starts_with_the_configs_token(model, tmp_path):
    shutil.copytree(model, tmp_path / "start")
    rewrite_json(tmp_path / "start" / "config.json", decoder_start_token_id=3)
    tokenizer = qj.load_tokenizer(tmp_path / "start")
    examples = samples(model.parent / "texts.jsonl", tokenizer)
    assert {int(decoder[0]) for _, decoder in examples} == {3}
    with pytest.raises(ValueError, match=r"example 0, decoder: .*decoder_start_token_id 3\), found 0"):
        qj.evaluate(*qj.load_model(tmp_path / "start"), examples_of(model))


@pytest.mark.parametrize("key", ["pad_token_id", "eos_token_id"])
def test_a_tokenizer_that_disagrees_with_config_json_is_refused(model, tmp_path, key):
    shutil.copytree(model, tmp_path / "model")
    rewrite_json(tmp_path / "model" / "config.json", **{key: 5})
    with pytest.raises(ValueError, match=f"key: {key}\n  expected: 5, the model's"):
        qj.load_tokenizer(tmp_path / "model")


def test_another_models_tokenizer_fills_no_blanks(model, renumbered):
    with pytest.raises(ValueError, match="key: pad_token_id\n  expected: 0, the model's\n  found: 3"):
        qj.fill_blanks(*qj.load_model(model), Tokenizer(renumbered), BLANKS)


def test_t5x_cannot_tell_other_ids(renumbered, tmp_path):
    with pytest.raises(qj.CheckpointError, match=r"T5X's format[\s\S]*pad_token_id[\s\S]*Hugging Face"):
        qj.convert(renumbered, tmp_path / "t5x", "t5x")
    assert not (tmp_path / "t5x").exists()
    copy = qj.convert(renumbered, tmp_path / "copy", "huggingface")
    assert qj.open_checkpoint(copy).config == qj.open_checkpoint(renumbered).config


def test_models_with_other_ids_are_not_compared(model, renumbered):
    with pytest.raises(qj.CheckpointError, match=r"pad_token_id\n  expected: 0\n  found: 3"):
        qj.compare(model, renumbered, examples_of(model))
