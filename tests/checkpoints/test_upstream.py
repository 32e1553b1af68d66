"""Upstream QMoE's compressed directories: the golden one is read, and written again bit by bit."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.checkpoints import CheckpointError, open_dense
from qmoe_jax.checkpoints.huggingface import names
from qmoe_jax.checkpoints.upstream import UpstreamReader, write_upstream
from qmoe_jax.coding import EncodedRows, decode, upstream_codebook
from qmoe_jax.files.torch_pickle import TorchTensor, open_torch
from qmoe_jax.files.torch_writer import save_torch
from qmoe_jax.parameters import is_expert
from tests.helpers.checkpoint_samples import BFLOAT16, DATA, rewrite_json

GOLDEN = DATA / "upstream_ckpt_tiny_a"
WI = "encoder/layers_1/mlp/expert/wi/kernel"
EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_3.wi"


@pytest.fixture(scope="module")
def upstream() -> UpstreamReader:
    upstream = open_dense(GOLDEN)
    assert isinstance(upstream, UpstreamReader)
    return upstream


@pytest.fixture(scope="module")
def dense() -> dict[str, np.ndarray]:
    """Digits, and bfloat16 bits of the weights [out, in], as upstream's own program decodes them."""
    return dict(np.load(DATA / "upstream_ckpt_tiny_a_dense.npz"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN, tmp_path / "copy")


def read_all(file: Path) -> dict[str, np.ndarray | int]:
    return {
        key: value.read(slice(0, value.shape[0])) if isinstance(value, TorchTensor) else value
        for key, value in open_torch(file).items()
    }


def rewrite_tensors(file: Path, **changes: np.ndarray | None) -> None:
    entries = {**read_all(file), **changes}
    save_torch(file, {key: value for key, value in entries.items() if value is not None})


def test_decodes_every_matrix_as_upstream_does(
    upstream: UpstreamReader, dense: dict[str, np.ndarray]
) -> None:
    count = 0
    for name in filter(is_expert, upstream.names()):
        for expert, array in enumerate(upstream.read(name)):
            bits = np.ascontiguousarray(array.T).view(np.uint16)
            np.testing.assert_array_equal(bits, dense[names.to_huggingface(name, expert)])
            count += 1
    assert count == sum(key.endswith(".weight") for key in dense) == 64


def test_all_but_the_experts_of_an_upstream_directory_is_the_original_model(upstream: UpstreamReader) -> None:
    """Linear layers rounded to bfloat16, all else in float32; a router is a linear layer too."""
    original = open_dense(DATA / "hf_tiny_a")
    for name in original.names():
        if not is_expert(name):
            dtype = BFLOAT16 if name.endswith("/kernel") else np.dtype(np.float32)
            got, want = upstream.read(name), original.read(name).astype(dtype)
            assert (got.dtype, got.tobytes()) == (dtype, want.tobytes()), name


def test_a_tied_head_of_another_precision_is_a_scaled_head(upstream: UpstreamReader) -> None:
    assert not upstream.config.tied
    assert any("the head is stored as bfloat16" in note for note in upstream.notes)
    embedding = open_dense(DATA / "hf_tiny_a").read("token_embedder/embedding")
    head = embedding.T.astype(BFLOAT16).astype(np.float32) / np.float32(8)  # the square root of d_model 64
    np.testing.assert_array_equal(upstream.read("decoder/logits_dense/kernel"), head)


def test_a_tied_head_of_the_same_precision_is_the_embedding(copy: Path) -> None:
    entries = read_all(copy / "noexp.pt")
    head = entries["lm_head.weight"]
    rewrite_tensors(copy / "noexp.pt", **{"shared.weight": head})  # type: ignore[dict-item]
    upstream = open_dense(copy)
    assert upstream.config == open_dense(DATA / "hf_tiny_a").config
    assert upstream.dtype("token_embedder/embedding") == ml_dtypes.bfloat16


def test_expert_kernels_are_packed_without_encoding_them_again(
    upstream: UpstreamReader, dense: dict[str, np.ndarray]
) -> None:
    packed = upstream.packed(WI, slice(2, 4))
    stored = read_all(GOLDEN / "exp00.pt")
    assert (packed.num_experts, packed.width) == (2, 64)
    for i, expert in enumerate((2, 3)):
        prefix = f"encoder.block.1.layer.1.mlp.experts.expert_{expert}.wi"
        codes, offsets, levels = (
            np.asarray(stored[f"{prefix}.{k}"]) for k in ("w_comp", "row_off", "ter_minmax")
        )
        np.testing.assert_array_equal(np.asarray(packed.codes)[i, : codes.size], codes.view(np.uint16))
        np.testing.assert_array_equal(np.asarray(packed.row_offsets)[i], offsets)
        np.testing.assert_array_equal(np.asarray(packed.levels)[i], levels.reshape(-1, 2))
        digits = decode(EncodedRows(codes.view(np.uint16), offsets), upstream_codebook(), packed.width)
        np.testing.assert_array_equal(digits, dense[f"{prefix}.tern"])
    with pytest.raises(ValueError, match="not an expert kernel"):
        upstream.packed("encoder/encoder_norm/scale")


def test_writes_what_upstream_wrote(
    upstream: UpstreamReader, dense: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The same files, keys, dtypes and bytes of every tensor, and a config.json that says the same model."""

    def ternary(name: str, expert: int) -> tuple[np.ndarray, np.ndarray]:
        packed = upstream.packed(name, slice(expert, expert + 1))
        digits = dense[names.to_huggingface(name, expert).removesuffix("weight") + "tern"]
        return digits, np.asarray(packed.levels)[0]

    written = write_upstream(open_dense(DATA / "hf_tiny_a"), tmp_path / "out", ternary)
    assert {file.name for file in written.iterdir()} == {file.name for file in GOLDEN.iterdir()}
    for file in GOLDEN.glob("*.pt"):
        ours, theirs = read_all(written / file.name), read_all(file)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, np.ndarray):
                other = np.asarray(ours[key])
                assert (value.dtype, value.shape, value.tobytes()) == (
                    other.dtype,
                    other.shape,
                    other.tobytes(),
                )
            else:
                assert ours[key] == value
    stated, original = (json.loads((p / "config.json").read_text()) for p in (written, GOLDEN))
    for key in (
        "d_model",
        "num_layers",
        "encoder_sparse_step",
        "torch_dtype",
        "router_jitter_noise",
        "dense_act_fn",
    ):
        assert stated[key] == original[key]
    assert "is_full_sparse" not in stated


def test_writing_upstream_stores_the_embedding_once(tmp_path: Path, upstream: UpstreamReader) -> None:
    size = sum(file.stat().st_size for file in GOLDEN.glob("noexp.pt"))
    zeros = (np.zeros((128, 64), np.uint8), np.zeros((128, 2), np.float32))
    flipped = (zeros[0].reshape(64, 128), zeros[1][:64])
    written = write_upstream(
        open_dense(DATA / "hf_tiny_a"), tmp_path / "out", lambda name, _: zeros if "/wi/" in name else flipped
    )
    assert (written / "noexp.pt").stat().st_size < 1.01 * size
    assert not open_dense(written).read(WI).any()


def test_writing_upstream_refuses_a_directory_that_is_not_empty(
    tmp_path: Path, upstream: UpstreamReader
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        write_upstream(upstream, tmp_path, lambda name, expert: pytest.fail("nothing is to be read"))


@pytest.mark.parametrize("file", ["exp02.pt", "sizes.pt", "config.json"])
def test_a_missing_upstream_file_is_named(file: str, copy: Path) -> None:
    (copy / file).unlink()
    with pytest.raises(CheckpointError, match="decoder.block.1" if file.startswith("exp") else file):
        open_dense(copy)


@pytest.mark.parametrize("file", ["exp02.pt", "noexp.pt", "sizes.pt"])
def test_a_truncated_upstream_file_is_named(file: str, copy: Path) -> None:
    (copy / file).write_bytes((copy / file).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=file):
        open_dense(copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("w_comp", np.zeros(5, np.int16), r"w_comp\n  expected: int16 \(\d+,\)\n  found: int16 \(5,\)"),
        ("w_comp", None, "w_comp"),
        ("row_off", np.zeros(129, np.int64), "expected: int32"),
        ("ter_minmax", np.zeros(255, BFLOAT16), r"expected: bfloat16 \(256,\)"),
        ("row_off", np.zeros(65, np.int32), r"ter_minmax\n  expected: bfloat16 \(128,\)"),
    ],
)
def test_a_coded_matrix_that_does_not_fit_is_named(
    key: str, value: np.ndarray | None, message: str, copy: Path
) -> None:
    rewrite_tensors(copy / "exp00.pt", **{f"{EXPERT}.{key}": value})
    with pytest.raises(CheckpointError, match=message) as caught:
        open_dense(copy)
    assert EXPERT in str(caught.value)


def test_damaged_codewords_are_named(copy: Path) -> None:
    offsets = np.asarray(read_all(copy / "exp00.pt")[f"{EXPERT}.row_off"]).copy()
    offsets[5] = offsets[6]
    rewrite_tensors(copy / "exp00.pt", **{f"{EXPERT}.row_off": offsets})
    upstream = open_dense(copy)
    assert upstream.read(WI, slice(0, 3)).shape == (3, 64, 128)
    assert upstream.packed(WI, slice(0, 3)).shape == (3, 128, 64)
    with pytest.raises(CheckpointError, match=rf"exp00(.|\n)*{EXPERT}(.|\n)*row [45]"):
        upstream.read(WI, slice(3, 4))
    with pytest.raises(CheckpointError, match=rf"exp00(.|\n)*{EXPERT}(.|\n)*row [45]"):
        upstream.packed(WI, slice(3, 4))


def test_an_upstream_config_json_of_another_model_is_refused(copy: Path) -> None:
    rewrite_json(copy / "config.json", model_type="t5")
    with pytest.raises(CheckpointError, match="model_type"):
        open_dense(copy)
