"""T5X's format: golden checkpoints that T5X itself wrote, and the variants of its versions."""

import dataclasses
import functools
import gzip
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from qmoe_jax.artifact.convert import convert
from qmoe_jax.checkpoints import CheckpointError, open_dense, write_t5x
from qmoe_jax.checkpoints.t5x import write_parameters
from qmoe_jax.checkpoints.t5x.writer import chunk_shape
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.msgpack import decode_tree, leaves
from tests.helpers.checkpoint_samples import (
    BFLOAT16,
    DATA,
    EXPERTS,
    LAYOUTS,
    TINY,
    TINY_GATED,
    TINY_TIED,
    memory_checkpoint,
    nested,
    random_parameters,
)

GOLDEN = {name: DATA / "t5x" / name for name in ("switch_base_tiny_f32", "switch_c_tiny_f32")}

Spec = dict


def decode_by_hand(directory: Path) -> np.ndarray:
    """Decode a zarr array of one chunk with nothing but gzip and NumPy."""
    metadata = json.loads((directory / ".zarray").read_text())
    (chunk,) = (file for file in directory.iterdir() if file.name != ".zarray")
    return np.frombuffer(gzip.decompress(chunk.read_bytes()), metadata["dtype"]).reshape(metadata["shape"])


@pytest.mark.parametrize("path", GOLDEN.values(), ids=GOLDEN)
def test_reads_what_t5x_wrote(path: Path) -> None:
    opened = open_dense(path)
    target = json.loads((path / "params.json").read_text())["target"]
    assert opened.names() == sorted(target)
    for name, stated in target.items():
        array = decode_by_hand(path / "checkpoint_1000" / f"target.{name.replace('/', '.')}")
        assert (list(array.shape), array.dtype.name) == (stated["shape"], stated["dtype"])
        np.testing.assert_array_equal(opened.read(name), array)


def test_infers_the_architecture_of_what_t5x_wrote() -> None:
    base, c = (open_dense(path).config for path in GOLDEN.values())
    tiny = functools.partial(
        SwitchConfig,
        d_model=64,
        d_ff=128,
        d_kv=16,
        num_encoder_layers=4,
        num_decoder_layers=4,
        num_experts=8,
        vocab_size=512,
    )
    odd, every = (1, 3), (0, 1, 2, 3)
    assert base == tiny(num_heads=4, encoder_sparse_layers=odd, decoder_sparse_layers=odd)
    assert c == tiny(num_heads=3, encoder_sparse_layers=every, decoder_sparse_layers=every, tied=False)


@pytest.mark.parametrize("path", GOLDEN.values(), ids=GOLDEN)
def test_writes_what_t5x_wrote(path: Path, tmp_path: Path) -> None:
    """The same files, byte by byte, except the optimizer's state in the msgpack, which we do not write."""
    written = write_t5x(open_dense(path), tmp_path, step=1000)
    original = path / "checkpoint_1000"
    for file in original.glob("target.*/*"):
        assert (written / file.relative_to(original)).read_bytes() == file.read_bytes(), file
    ours, theirs = (decode_tree((p / "checkpoint").read_bytes(), p) for p in (written, original))
    assert ours["version"] == theirs["version"]
    assert ours["optimizer"]["target"] == theirs["optimizer"]["target"]
    assert ours["optimizer"]["state"]["step"] == theirs["optimizer"]["state"]["step"]
    assert {p.name for p in written.iterdir()} == {p.name for p in original.iterdir()}


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((128, 768, 3072), [128, 256, 384]),
        ((128, 1024, 4096), [128, 256, 512]),
        ((2048, 2080, 6144), [256, 208, 256]),
        ((32128, 768), [16064, 768]),
        ((5,), [5]),
        ((), []),
    ],
)
def test_chunks_have_the_shapes_that_t5x_chooses(shape: tuple[int, ...], chunks: list[int]) -> None:
    assert chunk_shape(shape, itemsize=4) == chunks


def test_writing_t5x_rounds_to_bfloat16_on_request(tmp_path: Path) -> None:
    parameters = random_parameters(dtype=np.dtype(np.float32))
    opened = open_dense(write_parameters(nested(parameters), tmp_path, step=3, dtype=BFLOAT16))
    assert opened.read(EXPERTS).tobytes() == parameters[EXPERTS].astype(BFLOAT16).tobytes()


def test_writing_and_opening_t5x_takes_paths_with_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_parameters(nested(random_parameters()), "../there/./models", step=3)
    for path in ("../there/models", "../here/../there/models/checkpoint_3/checkpoint"):
        assert open_dense(path).read(EXPERTS).shape == (5, 8, 12)


def test_writing_t5x_never_overwrites_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    write_parameters(nested(random_parameters()), tmp_path, step=3)
    with pytest.raises(CheckpointError, match="checkpoint_3: exists already"):
        write_parameters(nested(random_parameters()), tmp_path, step=3)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_3"]


def empty_dicts(tree: dict, prefix: str = "") -> list[str]:
    below = [
        place
        for key, value in tree.items()
        if isinstance(value, dict)
        for place in empty_dicts(value, f"{prefix}/{key}")
    ]
    return below if tree else [prefix]


@pytest.mark.parametrize("dtype", [None, BFLOAT16], ids=str)
@pytest.mark.parametrize("config", [TINY, TINY_TIED, TINY_GATED], ids=["untied", "tied", "gated"])
def test_an_index_is_what_the_readers_of_t5x_take(
    config: SwitchConfig, dtype: np.dtype | None, tmp_path: Path
) -> None:
    """T5X's `load_t5x_checkpoint` takes an empty dict for an array and drops members of a spec's metadata."""
    parameters = random_parameters(config, np.dtype(np.float32))
    written = convert(memory_checkpoint(config, parameters), tmp_path, "t5x", step=3, dtype=dtype)
    tree = decode_tree((written / "checkpoint").read_bytes(), written)
    assert empty_dicts(tree) == []
    assert (tree.keys(), tree["version"]) == ({"version", "optimizer"}, 3)
    assert tree["optimizer"].keys() == {"state", "target"}
    assert {name: step.tolist() for name, step in tree["optimizer"]["state"].items()} == {"step": 3}
    found = dict(leaves(tree["optimizer"]["target"]))
    assert found.keys() == parameters.keys()
    for name, spec in found.items():
        assert spec["kvstore"] == {"driver": "file", "path": f"target.{name.replace('/', '.')}/"}
        assert spec["dtype"] == (dtype or np.dtype(np.float32)).name
        assert spec["metadata"].keys() == {"chunks", "compressor", "shape"}
        assert tuple(spec["metadata"]["shape"]) == parameters[name].shape


def test_writing_scanned_layers_leaves_no_empty_dict(tmp_path: Path) -> None:
    scanned = LAYOUTS["t5x, scanned"](tmp_path / "scanned", TINY, random_parameters())
    for written in (scanned, convert(scanned, tmp_path / "out", "t5x")):
        assert empty_dicts(decode_tree((written / "checkpoint").read_bytes(), written)) == []


def as_gfile(spec: Spec) -> Spec:
    return {**spec, "kvstore": {**spec["kvstore"], "driver": "gfile"}}


def as_gcs_with_path_above(spec: Spec) -> Spec:
    bucket = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
    return {**spec, "kvstore": bucket, "path": spec["kvstore"]["path"].rstrip("/")}


def as_dtype_below(spec: Spec) -> Spec:
    dtype = {"float32": "<f4", "bfloat16": "bfloat16"}[spec["dtype"]]
    return {"metadata": {**spec["metadata"], "dtype": dtype}} | {k: spec[k] for k in ("driver", "kvstore")}


def as_wrong_chunks(spec: Spec) -> Spec:
    """T5X's reader ignores them too: the .zarray decides."""
    return {**spec, "metadata": {**spec["metadata"], "chunks": [1] * 9, "compressor": {"id": "blosc"}}}


def as_absolute_path(spec: Spec) -> Spec:
    return {
        **spec,
        "kvstore": {**spec["kvstore"], "path": f"/where/it/was/written/{spec['kvstore']['path']}"},
    }


def change_specs(checkpoint: Path, change: Callable[[Spec], Spec]) -> None:
    tree = decode_tree((checkpoint / "checkpoint").read_bytes(), checkpoint)

    def walk(node: dict) -> dict:
        if "kvstore" in node:
            return change(node)
        return {key: walk(value) for key, value in node.items()}

    tree["optimizer"]["target"] = walk(tree["optimizer"]["target"])
    (checkpoint / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


SELF_CONTAINED = [as_gfile, as_gcs_with_path_above, as_dtype_below, as_absolute_path]


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize(
    ("change", "zarray"),
    [(change, True) for change in (*SELF_CONTAINED, as_wrong_chunks)]
    + [(change, False) for change in SELF_CONTAINED],
)
def test_reads_every_spelling_of_a_spec(
    change: Callable[[Spec], Spec], zarray: bool, dtype: np.dtype, tmp_path: Path
) -> None:
    parameters = random_parameters(dtype=dtype)
    checkpoint = write_parameters(nested(parameters), tmp_path, step=3)
    change_specs(checkpoint, change)
    if not zarray:
        for file in checkpoint.glob("*/.zarray"):
            file.unlink()
    opened = open_dense(checkpoint)
    for name, array in parameters.items():
        assert opened.read(name).tobytes() == array.tobytes()


def test_reads_bfloat16_as_version_2_of_t5x_stored_it(tmp_path: Path) -> None:
    parameters = random_parameters()
    bits = {name: array.view(np.uint16) for name, array in parameters.items()}
    checkpoint = write_parameters(nested(bits), tmp_path, step=3)
    tree = decode_tree((checkpoint / "checkpoint").read_bytes(), checkpoint)
    (checkpoint / "checkpoint").write_bytes(serialization.msgpack_serialize({**tree, "version": 2}))
    opened = open_dense(checkpoint)
    assert opened.dtype(EXPERTS) == ml_dtypes.bfloat16
    assert opened.read(EXPERTS, slice(1, 3)).tobytes() == parameters[EXPERTS][1:3].tobytes()


def test_reads_arrays_that_flax_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    parameters = random_parameters()
    path = tmp_path / "checkpoint"
    path.write_bytes(
        serialization.msgpack_serialize({"optimizer": {"target": nested(parameters)}, "version": 3})
    )
    opened = open_dense(path)
    for name, array in parameters.items():
        assert opened.read(name).tobytes() == array.tobytes()


@pytest.mark.parametrize("axis", [0, 1])
def test_reads_layers_stacked_on_either_axis(axis: int, tmp_path: Path) -> None:
    """`encoder/layers/...` without blocks, one position bias per stack: as other T5X models are scanned."""
    config = dataclasses.replace(TINY, encoder_sparse_layers=(0, 1, 2, 3))
    parameters = random_parameters(config)
    stacked = {name: array for name, array in parameters.items() if "layers_" not in name}
    for name in (name for name in parameters if "layers_0" in name):
        layers = [name.replace("layers_0", f"layers_{i}") for i in range(4)]
        arrays = [parameters[layer] for layer in layers if layer in parameters]
        stacked[name.replace("layers_0", "layers")] = np.stack(arrays, axis)
    opened = open_dense(write_parameters(nested(stacked), tmp_path, step=3))
    assert opened.config == config
    for name, array in parameters.items():
        assert opened.read(name).tobytes() == array.tobytes()
    assert opened.read(EXPERTS, slice(1, 3)).tobytes() == parameters[EXPERTS][1:3].tobytes()


def test_a_range_of_experts_reads_only_the_chunks_that_hold_it(tmp_path: Path) -> None:
    """Proven by deleting the others: T5X stores no fill value, so reading one of them would be an error."""
    parameters = random_parameters(dtype=np.dtype(np.float32))
    checkpoint = write_parameters(nested(parameters), tmp_path, step=3)
    directory = checkpoint / f"target.{EXPERTS.replace('/', '.')}"
    shutil.rmtree(directory)
    write_with_chunks(directory, parameters[EXPERTS], [2, 8, 12])
    for chunk in ("0.0.0", "2.0.0"):
        (directory / chunk).unlink()
    opened = open_dense(checkpoint, check=False)
    np.testing.assert_array_equal(opened.read(EXPERTS, slice(2, 4)), parameters[EXPERTS][2:4])
    assert opened.tensors[EXPERTS].rows_per_chunk == 2  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"0\.0\.0"):
        opened.read(EXPERTS, slice(1, 3))


def write_with_chunks(directory: Path, array: np.ndarray, chunks: list[int]) -> None:
    import tensorstore as ts

    metadata = {"chunks": chunks, "shape": list(array.shape), "compressor": {"id": "zstd", "level": 1}}
    kvstore = {"driver": "file", "path": f"{directory}/"}
    spec = {"driver": "zarr", "dtype": array.dtype.name, "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True).result().write(array).result()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of a local HTTP server of `tmp_path`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_t5x_is_read_from_a_url(tmp_path: Path, served: str) -> None:
    parameters = random_parameters()
    write_parameters(nested(parameters), tmp_path, step=3)
    for url in (f"{served}/checkpoint_3", f"{served}/checkpoint_3/checkpoint"):
        opened = open_dense(url)
        assert (opened.config, opened.path) == (TINY, f"{served}/checkpoint_3")
        assert opened.read(EXPERTS, slice(1, 3)).tobytes() == parameters[EXPERTS][1:3].tobytes()


def test_a_url_without_a_checkpoint_is_refused(served: str) -> None:
    with pytest.raises(CheckpointError, match=r"nothing-here(.|\n)*t5x: checkpoint"):
        open_dense(f"{served}/nothing-here")
