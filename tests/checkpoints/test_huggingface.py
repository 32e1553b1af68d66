"""Hugging Face checkpoints: golden ones of transformers, the quirks of published ones, and our own."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qmoe_jax.checkpoints import CheckpointError, open_dense
from qmoe_jax.checkpoints.huggingface import names, write_huggingface
from qmoe_jax.files.safetensors import read_header
from qmoe_jax.files.torch_pickle import open_torch
from qmoe_jax.files.torch_writer import save_torch
from qmoe_jax.parameters import is_expert
from tests.helpers.checkpoint_samples import (
    BFLOAT16,
    DATA,
    EXPERTS,
    LAYOUTS,
    TINY,
    TINY_GATED,
    TINY_TIED,
    huggingface_arrays,
    memory_checkpoint,
    random_parameters,
    rewrite_json,
)

GOLDEN = ("hf_tiny_a", "hf_tiny_fullsparse")


@pytest.mark.parametrize("model", GOLDEN)
def test_reads_what_transformers_wrote(model: str) -> None:
    checkpoint, stored = open_dense(DATA / model), load_file(DATA / model / "model.safetensors")
    assert checkpoint.notes == []
    for name in checkpoint.names():
        array = checkpoint.read(name)
        if is_expert(name):
            want = np.stack([stored[names.to_huggingface(name, e)].T for e in range(len(array))])
        else:
            want = stored[names.to_huggingface(name)]
            want = want if name == "token_embedder/embedding" else want.T
        np.testing.assert_array_equal(array, want)


@pytest.mark.parametrize("model", GOLDEN)
def test_infers_the_architecture_of_what_transformers_wrote(model: str) -> None:
    config, stated = open_dense(DATA / model).config, json.loads((DATA / model / "config.json").read_text())
    assert (config.num_encoder_layers, config.num_decoder_layers) == (
        stated["num_layers"],
        stated["num_decoder_layers"],
    )
    assert config.tied == stated["tie_word_embeddings"]
    assert config.num_experts == stated["num_experts"]
    step = stated["encoder_sparse_step"]
    every_step = tuple(i for i in range(config.num_encoder_layers) if step == 1 or i % step == 1)
    assert config.encoder_sparse_layers == config.decoder_sparse_layers == every_step


@pytest.mark.parametrize("model", GOLDEN)
@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
def test_writes_what_transformers_wrote(model: str, shard_bytes: int, tmp_path: Path) -> None:
    """The same tensors and names, as the safetensors library reads them, and the same architecture."""
    output = write_huggingface(open_dense(DATA / model), tmp_path / "copy", shard_bytes=shard_bytes)
    files = sorted(output.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)
    assert all(file.stat().st_size < shard_bytes + 100_000 for file in files)
    ours = {key: array for file in files for key, array in load_file(file).items()}
    theirs = load_file(DATA / model / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    stated, original = (json.loads((p / "config.json").read_text()) for p in (output, DATA / model))
    silent = {"dropout_rate", "expert_capacity"}  # ours drops no token, theirs is of a test's size
    for key in (stated.keys() & original.keys()) - silent:
        assert stated[key] == original[key], key
    assert open_dense(output).notes == []


def test_tensors_decide_where_config_json_contradicts_them(tmp_path: Path) -> None:
    """The published config.json of c-2048 and xxl: fewer layers, another pattern, tied, not gated."""
    path = LAYOUTS["torch, shards"](tmp_path / "model", TINY_GATED, random_parameters(TINY_GATED))
    rewrite_json(
        path / "config.json",
        num_layers=48,
        decoder_sparse_step=0,
        num_sparse_decoder_layers=9,
        tie_word_embeddings=None,
        is_gated_act=False,
        dense_act_fn="gelu",
        num_heads=32,
    )
    checkpoint = open_dense(path)
    assert checkpoint.config == TINY_GATED
    assert "config.json says num_layers 48, the tensors say 4" in checkpoint.notes
    assert len(checkpoint.notes) == 4


def test_config_json_gives_what_no_shape_tells(tmp_path: Path) -> None:
    path = LAYOUTS["safetensors"](tmp_path / "model", TINY, random_parameters())
    rewrite_json(path / "config.json", layer_norm_epsilon=1e-5, eos_token_id=7, pad_token_id=None)
    assert open_dense(path).config == dataclasses.replace(TINY, layer_norm_epsilon=1e-5, eos_id=7)


@pytest.mark.parametrize(
    ("key", "value", "expected", "found"),
    [
        ("eos_token_id", [1, 2], "one token id, an integer of 0 or more", r"\[1, 2\] \(a list\)"),
        ("eos_token_id", "1", "one token id", r'"1" \(a string\)'),
        ("pad_token_id", True, "one token id", r"true \(a boolean\)"),
        ("pad_token_id", 0.0, "one token id", r"0.0 \(a number with a fraction\)"),
        ("decoder_start_token_id", -1, "one token id", r"-1 \(an integer\)"),
        ("pad_token_id", 11, "0 to 10, the rows of the embedding", "11"),
        ("d_model", "8", "an integer of 1 or more", r'"8" \(a string\)'),
        ("num_experts", -5, "an integer of 0 or more", "-5"),
        ("tie_word_embeddings", "false", "true or false", r'"false" \(a string\)'),
        ("dense_act_fn", ["relu"], "a string", r'\["relu"\] \(a list\)'),
        ("layer_norm_epsilon", "1e-6", "a finite number of 0 or more", '"1e-6"'),
        ("layer_norm_epsilon", float("nan"), "a finite number of 0 or more", "NaN"),
        ("relative_attention_max_distance", 128.5, "an integer of 1 or more", "128.5"),
    ],
)
def test_members_of_the_wrong_type_or_value_are_named(tmp_path, key, value, expected, found) -> None:
    path = LAYOUTS["safetensors"](tmp_path / "model", TINY, random_parameters())
    rewrite_json(path / "config.json", **{key: value})
    with pytest.raises(
        CheckpointError, match=rf"config\.json: .*\n  key: {key}\n  expected: {expected}.*\n  found: {found}"
    ):
        open_dense(path)


@pytest.mark.parametrize("key", ["pad_token_id", "eos_token_id", "decoder_start_token_id"])
def test_a_model_without_such_a_token_is_refused(tmp_path: Path, key: str) -> None:
    path = LAYOUTS["safetensors"](tmp_path / "model", TINY, random_parameters())
    stated = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**stated, key: None}))
    with pytest.raises(CheckpointError, match=rf"key: {key}\n  expected: one token id.*\n  found: null"):
        open_dense(path)


def test_another_padding_needs_a_stated_start_token(tmp_path: Path) -> None:
    path = LAYOUTS["safetensors"](tmp_path / "model", TINY, random_parameters())
    rewrite_json(path / "config.json", pad_token_id=3, decoder_start_token_id=None)
    with pytest.raises(CheckpointError, match=r"key: decoder_start_token_id[\s\S]*pad_token_id is 3"):
        open_dense(path)
    rewrite_json(path / "config.json", decoder_start_token_id=3)
    assert open_dense(path).config == dataclasses.replace(TINY, pad_id=3, decoder_start_id=3)


def test_a_generation_config_with_other_ids_is_told(tmp_path: Path) -> None:
    path = LAYOUTS["safetensors"](tmp_path / "model", TINY, random_parameters())
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 7], "pad_token_id": 0}')
    checkpoint = open_dense(path)
    assert checkpoint.config == TINY
    assert checkpoint.notes == [
        "generation_config.json says eos_token_id [1, 7], and is ignored: config.json's 1 is used"
    ]


def test_a_tied_head_is_the_embedding_whatever_is_stored(tmp_path: Path) -> None:
    """transformers overwrites it, unless config.json says that it is not tied."""
    path = LAYOUTS["torch"](tmp_path / "model", TINY, random_parameters())
    assert not open_dense(path).config.tied
    for statement in (True, None):  # absent means true
        rewrite_json(path / "config.json", tie_word_embeddings=statement)
        checkpoint = open_dense(path)
        assert checkpoint.config.tied
        assert "decoder/logits_dense/kernel" not in checkpoint.names()


def test_a_checkpoint_without_config_json_opens_with_a_note(tmp_path: Path) -> None:
    path = LAYOUTS["safetensors"](tmp_path / "model", TINY_TIED, random_parameters(TINY_TIED))
    (path / "config.json").unlink()
    checkpoint = open_dense(path)
    assert checkpoint.config == TINY_TIED
    assert "no config.json" in checkpoint.notes[0]


def test_a_range_of_experts_reads_only_their_bytes_of_a_torch_file(tmp_path: Path) -> None:
    """All experts lie in one storage, and the file ends within the third: the first two can be read."""
    parameters = random_parameters()
    path = LAYOUTS["torch"](tmp_path / "model", TINY, parameters)
    checkpoint = open_dense(path)
    storage = open_torch(path / "pytorch_model.bin")[names.to_huggingface(EXPERTS, 0)].storage
    expert_bytes = parameters[EXPERTS][0].nbytes
    with open(path / "pytorch_model.bin", "r+b") as file:
        file.truncate(storage.data_offset() + 2 * expert_bytes + 1)
    assert checkpoint.read(EXPERTS, slice(0, 2)).tobytes() == parameters[EXPERTS][:2].tobytes()
    with pytest.raises(
        CheckpointError, match=r"cut short\n  key: encoder.block.1.layer.1.mlp.experts.expert_2.wi"
    ):
        checkpoint.read(EXPERTS, slice(1, 3))


def test_different_embeddings_of_encoder_and_decoder_are_refused(tmp_path: Path) -> None:
    parameters = random_parameters()
    path = LAYOUTS["torch"](tmp_path / "model", TINY, parameters)
    stored = huggingface_arrays(TINY, parameters)
    copy = {"encoder.embed_tokens.weight": stored["shared.weight"]}
    save_torch(path / "pytorch_model.bin", {**stored, **copy})
    open_dense(path)
    copy["encoder.embed_tokens.weight"] = copy["encoder.embed_tokens.weight"] + BFLOAT16.type(1)
    save_torch(path / "pytorch_model.bin", {**stored, **copy})
    with pytest.raises(CheckpointError, match="different embeddings"):
        open_dense(path)


def test_writing_hugging_face_refuses_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        write_huggingface(memory_checkpoint(TINY, random_parameters()), tmp_path)


def test_a_pattern_of_layers_that_config_json_cannot_express_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, encoder_sparse_layers=(0, 3))
    with pytest.raises(CheckpointError, match=r"encoder_sparse_step(.|\n)*\(0, 3\)"):
        write_huggingface(memory_checkpoint(config, random_parameters(config)), tmp_path / "out")


def test_safetensors_are_preferred_and_an_index_cannot_point_outside(tmp_path: Path) -> None:
    path = LAYOUTS["torch, shards"](tmp_path / "model", TINY, random_parameters())
    rewrite_json(path / "pytorch_model.bin.index.json", weight_map={"shared.weight": "../secret.bin"})
    with pytest.raises(CheckpointError, match=r"outside(.|\n)*secret"):
        open_dense(path)
    shutil.copy(DATA / "hf_tiny_a" / "model.safetensors", path)
    assert open_dense(path).config.d_model == 64


@pytest.mark.parametrize(
    "key", ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
)
def test_a_copy_that_differs_from_a_tied_embedding_is_told(key: str, tmp_path: Path) -> None:
    parameters = random_parameters(TINY_TIED)
    path = LAYOUTS["torch"](tmp_path / "model", TINY_TIED, parameters)
    stored = huggingface_arrays(TINY_TIED, parameters)
    for copy, told in ((stored["shared.weight"].copy(), False), (stored["shared.weight"] + 1, True)):
        save_torch(path / "pytorch_model.bin", stored | {key: copy})
        opened = open_dense(path)
        assert opened.config == TINY_TIED
        assert opened.read("token_embedder/embedding").tobytes() == stored["shared.weight"].tobytes()
        assert any(f"{key} differs from shared.weight" in note for note in opened.notes) == told


def test_what_transformers_reads_of_a_directory_is_written(tmp_path: Path) -> None:
    """Tried with transformers 5.24: no missing or unexpected keys, equal logits (tied, untied, sharded)."""
    config = dataclasses.replace(TINY_TIED, decoder_sparse_layers=(1,))
    parameters = random_parameters(config)
    path = write_huggingface(memory_checkpoint(config, parameters), tmp_path / "model", shard_bytes=1000)
    stated = json.loads((path / "config.json").read_text())
    expected = {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": "switch_transformers",
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "num_sparse_encoder_layers": 2,
        "encoder_sparse_step": 2,
        "num_sparse_decoder_layers": 1,
        "decoder_sparse_step": 2,
    }
    assert {key: stated[key] for key in expected} == expected
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in parameters.values())
    for file in set(index["weight_map"].values()):
        header = read_header(path / file)
        assert header.metadata == {"format": "pt"}
        assert {entry.name for entry in header.tensors} == {
            key for key, name in index["weight_map"].items() if name == file
        }
