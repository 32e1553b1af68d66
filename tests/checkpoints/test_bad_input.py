"""Damaged and foreign checkpoints: one clear error at opening, with the file, what was expected and found."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import serialization

from qmoe_jax.checkpoints import CheckpointError, open_dense
from qmoe_jax.checkpoints.t5x import write_parameters
from qmoe_jax.files.msgpack import decode_tree
from tests.helpers.checkpoint_samples import (
    BFLOAT16,
    EXPERTS,
    LAYOUTS,
    TINY,
    nested,
    random_parameters,
    rewrite_json,
)
from tests.helpers.torch_archives import write_torch_archive

CHUNK = f"target.{EXPERTS.replace('/', '.')}/0.0.0"


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_dense(path)
    for word in words:
        assert word in str(caught.value)


def make(layout: str, tmp_path: Path, dtype: np.dtype = BFLOAT16) -> Path:
    return LAYOUTS[layout](tmp_path / "model", TINY, random_parameters(dtype=dtype))


def truncate(file: Path, share: float = 0.5) -> None:
    os.truncate(file, int(file.stat().st_size * share))


def test_a_path_without_a_checkpoint_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    refused(
        Path("no/such/checkpoint"),
        "no/such/checkpoint",
        "no such file",
        "model.safetensors",
        "checkpoint_<step>",
    )
    refused(tmp_path, str(tmp_path), "an empty directory")
    (tmp_path / "notes.md").touch()
    refused(tmp_path, "no checkpoint of a known format", "notes.md")
    with pytest.raises(CheckpointError, match="foo://"):
        open_dense("foo://bucket/checkpoint")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_zarr_chunk_is_refused_at_opening(share: float, tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    truncate(path / CHUNK, share)
    refused(path, CHUNK, "cut short")


def test_a_truncated_zarr_chunk_is_refused_by_a_read_without_a_check(tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    truncate(path / CHUNK)
    reader = open_dense(path, check=False)
    assert [shard.name for shard in reader.shards() if shard.problem] == [CHUNK]
    with pytest.raises(CheckpointError, match=r"0\.0\.0(.|\n)*copy the checkpoint again"):
        reader.read(EXPERTS)
    assert reader.read("encoder/encoder_norm/scale").shape == (8,)


def test_a_missing_zarr_chunk_is_refused(tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    (path / CHUNK).unlink()
    refused(path, CHUNK, "missing")
    with pytest.raises(CheckpointError, match=r"0\.0\.0(.|\n)*missing"):
        open_dense(path, check=False).read(EXPERTS)


def test_a_missing_zarr_chunk_reads_as_the_fill_value_if_there_is_one(tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    (path / CHUNK).unlink()
    rewrite_json((path / CHUNK).with_name(".zarray"), fill_value=1.5)
    assert (open_dense(path).read(EXPERTS, slice(1, 3)) == 1.5).all()


def test_a_missing_zarr_array_is_refused(tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    shutil.rmtree((path / CHUNK).parent)
    refused(path, CHUNK, "missing")


def test_a_zarr_array_of_another_shape_than_in_the_index_is_refused(tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    rewrite_json((path / CHUNK).with_name(".zarray"), shape=[5, 8, 13])
    refused(path, ".zarray", "expected: [5, 8, 12]", "found: [5, 8, 13]")


@pytest.mark.parametrize("metadata", [{"compressor": {"id": "lz9"}}, {"dtype": "<q9"}, {"zarr_format": 7}])
def test_a_zarr_array_that_tensorstore_cannot_open_is_refused(metadata: dict, tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    rewrite_json((path / CHUNK).with_name(".zarray"), **metadata)
    refused(path, str((path / CHUNK).parent), str(next(iter(metadata))))


def test_a_damaged_zarray_is_refused(tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    truncate((path / CHUNK).with_name(".zarray"))
    refused(path, ".zarray", "is not JSON that describes an array")


@pytest.mark.parametrize("member", ["dtype", "chunks", "shape"])
def test_a_zarr_array_without_a_description_is_refused(member: str, tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    tree = decode_tree((path / "checkpoint").read_bytes(), path)
    spec = tree["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"]
    (spec if member == "dtype" else spec["metadata"]).pop(member)
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    open_dense(path)
    (path / "target.encoder.encoder_norm.scale" / ".zarray").unlink()
    refused(path, "target.encoder.encoder_norm.scale", "has no description")


def test_a_truncated_t5x_index_is_refused(tmp_path: Path) -> None:
    path = make("t5x", tmp_path)
    truncate(path / "checkpoint")
    refused(path, "checkpoint", "cut short", "bytes")


def test_a_tensorflow_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1"')
    refused(tmp_path, "TensorFlow")


@pytest.mark.parametrize(
    "tree", [{}, {"version": 3, "optimizer": {"target": {"encoder": {"kernel": np.ones(3)}}}}]
)
def test_a_t5x_tree_of_another_model_is_refused(tree: dict, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    refused(tmp_path, "token_embedder/embedding")


def test_a_t5x_parameter_of_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    parameters = random_parameters() | {
        "decoder/layers_1/mlp/expert/wo/kernel": np.ones((5, 8, 12), BFLOAT16)
    }
    path = write_parameters(nested(parameters), tmp_path, step=3)
    refused(path, "decoder/layers_1/mlp/expert/wo/kernel", "expected: (5, 12, 8)", "found: (5, 8, 12)")


def test_scanned_layers_with_different_position_biases_are_refused(tmp_path: Path) -> None:
    path = make("t5x, scanned", tmp_path)
    parameters = {
        name: tensor.read(slice(0, tensor.shape[0]))
        for name, tensor in open_dense(path, check=False).tensors.items()
    }
    del parameters["encoder/relpos_bias/rel_embedding"]
    parameters["encoder/encoder/relpos_bias/rel_embedding"] = np.arange(24).reshape(2, 3, 4).astype(BFLOAT16)
    refused(write_parameters(nested(parameters), tmp_path, step=9), "layers have different position biases")


@pytest.mark.parametrize("layout", ["safetensors, shards", "torch, shards"])
def test_a_missing_shard_is_refused(layout: str, tmp_path: Path) -> None:
    path = make(layout, tmp_path)
    shard = sorted(path.glob("*-of-*"))[0]
    shard.unlink()
    refused(path, shard.name, "shards are missing", "index.json")


@pytest.mark.parametrize("layout", ["safetensors", "safetensors, shards", "torch", "torch, shards"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(layout: str, share: float, tmp_path: Path) -> None:
    path = make(layout, tmp_path)
    shard = sorted(file for file in path.iterdir() if file.suffix != ".json")[0]
    truncate(shard, share)
    refused(path, shard.name, "cut short")


def test_a_shard_without_a_tensor_of_the_index_is_refused(tmp_path: Path) -> None:
    path = make("safetensors, shards", tmp_path)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file = weight_map["encoder.final_layer_norm.weight"]
    rewrite_json(index, weight_map=weight_map | {"encoder.block.9.layer.0.layer_norm.weight": file})
    refused(path, file, "encoder.block.9.layer.0.layer_norm.weight")


def rewrite_safetensors(file: Path, change: Callable[[dict], object]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


EXPERT_3 = "encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight"
EXPERT_5 = EXPERT_3.replace("expert_3", "expert_5")  # of five, 0 to 4
ENCODER_NORM, HEAD_COPY = "encoder.final_layer_norm.weight", "decoder.lm_head.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.update({EXPERT_5: h.pop(EXPERT_3)}), ("an expert is missing", EXPERT_3)),
        (lambda h: h[EXPERT_3].update(shape=[8, 12]), ("differ in shape", EXPERT_3, "[12, 8]", "[8, 12]")),
        (lambda h: h[EXPERT_3].update(shape=[8, 13]), ("offsets do not fit", EXPERT_3, "208 bytes")),
        (lambda h: h[EXPERT_3].update(dtype="F4"), ("unknown dtype", EXPERT_3, "F4")),
        (lambda h: h[EXPERT_3].pop("data_offsets"), ("damaged entry", EXPERT_3)),
        (lambda h: h.update(extra=h.pop(EXPERT_3)), ("does not have", "extra")),
        (lambda h: h.update(extra=h[EXPERT_3]), ("overlap or leave a gap", "extra")),
        (lambda h: h.pop(ENCODER_NORM), ("overlap or leave a gap", "expected: data at byte")),
        (lambda h: h.update({HEAD_COPY: h.pop(ENCODER_NORM)}), ("missing", "encoder/encoder_norm/scale")),
    ],
)
def test_safetensors_that_do_not_fit_the_model_or_the_file_are_refused(
    change: Callable[[dict], object], words: tuple[str, ...], tmp_path: Path
) -> None:
    path = make("safetensors", tmp_path)
    rewrite_safetensors(path / "model.safetensors", change)
    refused(path, str(path), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "nllb-moe"}, ("model_type", "expected: switch_transformers", "found: nllb-moe")),
        ({"dense_act_fn": "silu"}, ("dense_act_fn", "expected: relu", "found: silu")),
        ({"dense_act_fn": "gelu"}, ("dense_act_fn", "found: gelu")),
    ],
)
def test_a_config_json_of_another_model_is_refused(
    changes: dict, words: tuple[str, ...], tmp_path: Path
) -> None:
    path = make("safetensors", tmp_path)
    rewrite_json(path / "config.json", **changes)
    refused(path, "config.json", *words)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_config_json_without_an_object_is_refused(text: str, tmp_path: Path) -> None:
    path = make("safetensors", tmp_path)
    (path / "config.json").write_text(text)
    refused(path, "config.json", "JSON")


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch owned",)


def test_a_pickle_with_a_malicious_global_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make("torch", tmp_path)
    write_torch_archive(path / "pytorch_model.bin", pickle.dumps({"shared.weight": Malicious()}, protocol=2))
    refused(path, "pytorch_model.bin", "posix.system", "do not load this file")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "old format"),
        (b"PK\x03\x04 cut short", "cut short"),
        (b"", "cut short"),
    ],
)
def test_a_file_that_is_not_an_archive_of_torch_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    refused(tmp_path, "pytorch_model.bin", message)
