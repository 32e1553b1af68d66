"""Dense checkpoints of every format: each target changes one of their files."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore as ts

from qmoe_jax.artifact import open_checkpoint
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.upstream.reader import UpstreamReader
from qmoe_jax.checkpoints.upstream.writer import write_upstream
from qmoe_jax.config import SwitchConfig
from qmoe_jax.parameters import is_expert
from tests.fuzz import mutation
from tests.fuzz.target import Target
from tests.helpers import checkpoint_samples as samples

CONFIG = SwitchConfig(
    d_model=4,
    d_ff=6,
    d_kv=3,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_experts=2,
    encoder_sparse_layers=(0,),
    decoder_sparse_layers=(),
    vocab_size=5,
    tied=False,
    relative_attention_buckets=4,
)
# The embedding's rows are told by nothing else.
TIED = dataclasses.replace(CONFIG, tied=True)
MODEL = "model"
_INTEGERS = [name for name, kind in SwitchConfig.__annotations__.items() if kind == "int"]


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Read every parameter; raise if one is not what was announced, or the architecture is none."""
    for name in checkpoint.names():
        array = checkpoint.read(name)
        assert (array.shape, array.dtype) == (checkpoint.shape(name), checkpoint.dtype(name)), name
        if is_expert(name) and isinstance(checkpoint, UpstreamReader):
            checkpoint.packed(name).validate()
    for field in _INTEGERS:
        value = getattr(checkpoint.config, field)
        assert type(value) is int and value >= 0, f"{field}: {value!r}"
    epsilon = checkpoint.config.layer_norm_epsilon
    assert isinstance(epsilon, float | int) and 0 <= epsilon < 1e308, f"layer_norm_epsilon: {epsilon!r}"
    assert all(isinstance(note, str) for note in checkpoint.notes)


def load(directory: Path) -> None:
    """Open the checkpoint and read all of it."""
    check_checkpoint(open_checkpoint(directory / MODEL))


def _layout(layout: str, file: str) -> Callable[[Path], Path]:
    """Return the function that writes a layout, and of it the first file that matches a pattern."""

    def write(directory: Path) -> Path:
        path = directory / MODEL
        config = {"t5x, scanned": samples.TINY, "orbax, a directory an array": TIED}.get(layout, CONFIG)
        samples.LAYOUTS[layout](path, config, samples.random_parameters(config))
        return _first(path, file)

    return write


def _first(path: Path, pattern: str) -> Path:
    return path if path.is_file() else min(path.rglob(pattern))


def _upstream(file: str) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        rng = np.random.default_rng(0)
        shapes = {"wi": (CONFIG.d_ff, CONFIG.d_model), "wo": (CONFIG.d_model, CONFIG.d_ff)}

        def ternary(name: str, expert: int) -> tuple[np.ndarray, np.ndarray]:
            shape = shapes[name.split("/")[-2]]
            return rng.integers(0, 3, shape, np.uint8), np.array([[-1.0, 1.0]] * shape[0], np.float32)

        checkpoint = samples.memory_checkpoint(
            CONFIG, samples.random_parameters(CONFIG, np.dtype(np.float32))
        )
        write_upstream(checkpoint, directory / MODEL, ternary)
        return directory / MODEL / file

    return write


def _zarr3(file: str) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        samples._orbax(use_ocdbt=False, use_zarr3=True)(
            directory / MODEL, CONFIG, samples.random_parameters(CONFIG)
        )
        return _first(directory / MODEL, file)

    return write


def _compressed_by(compressor: dict) -> Callable[[Path], Path]:
    """Return the function that writes T5X's layout with an embedding compressed otherwise than by gzip."""

    def write(directory: Path) -> Path:
        parameters = samples.random_parameters(CONFIG, np.dtype(np.float32))
        step = samples.LAYOUTS["t5x"](directory / MODEL, CONFIG, parameters)
        array = step / "target.token_embedder.embedding"
        kvstore = {"driver": "file", "path": f"{array}/"}
        metadata = {"compressor": compressor, "dtype": "<f4", "shape": [5, 4], "chunks": [5, 4]}
        store = ts.open(
            {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}, create=True, delete_existing=True
        ).result()
        store.write(parameters["token_embedder/embedding"]).result()
        return array / "0.0"

    return write


def _legacy_torch(directory: Path) -> Path:
    """Write what torch.save wrote before version 1.6: pickles one after the other."""
    samples.LAYOUTS["torch"](directory / MODEL, CONFIG, samples.random_parameters(CONFIG))
    file = directory / MODEL / "pytorch_model.bin"
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {"int": 4}}, {"a": 1}, ["0"])
    file.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    return file


def change_ocdbt(data: bytes, rng: random.Random) -> bytes:
    """Change a file of an OCDBT database, whose last four bytes are a checksum, and mostly write it anew."""
    changed = bytearray(mutation.change_bytes(data, rng))
    if len(changed) > 12 and rng.random() < 0.9:
        changed[4:12] = len(changed).to_bytes(8, "little")
        changed[-4:] = crc32c(bytes(changed[:-4])).to_bytes(4, "little")
    return bytes(changed)


def crc32c(data: bytes) -> int:
    """Return the CRC of Castagnoli's polynomial, as iSCSI and OCDBT have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


def change_zarr_description(data: bytes, rng: random.Random) -> bytes:
    """Change a .zarray or zarr.json, sometimes in a way that T5X and NumPy give meaning to."""
    try:
        description = json.loads(data)
    except (ValueError, RecursionError):
        return mutation.change_bytes(data, rng)
    if isinstance(description, dict) and rng.random() < 0.3:
        known = {
            "compressor": [
                None,
                {"id": "blosc"},
                {"id": "zstd"},
                {"id": "gzip", "level": 99},
                "gzip",
                {"id": []},
                [],
            ],
            "fill_value": [None, 0, "NaN", "x", [], 1e400],
            "dtype": [
                "<f4",
                "|O",
                ">f8",
                "bfloat16",
                "|V4",
                "<U9999999",
                [["a", "<f4"]],
                "float8_e4m3b11fnuz",
            ],
            "shape": [[], [0, 0], [2**40, 4], [2**62, 2**62], [5, 4, 1], [-1, 4], [5.0, 4], "54"],
            "chunks": [[], [0, 0], [1, 1], [2**40, 4], [2**62, 2**62], [5], [-1, 4], "54", None],
            "order": ["F", "C", "X", None],
            "dimension_separator": ["/", ".", "", "x", None, 0, "..", "/../"],
            "filters": [[], [{"id": "delta"}], None, 0],
            "zarr_format": [2, 3, 1, None],
        }
        for key in rng.sample(sorted(known), rng.randrange(1, 4)):
            description[key] = rng.choice(known[key])
        return json.dumps(description).encode()
    return mutation.change_json(data, rng)


_JSON, _ZARR = (mutation.change_json, mutation.change_json, mutation.change_bytes), (change_zarr_description,)
_ARCHIVE = (mutation.change_archive,)
TARGETS = (
    Target("config-json", _layout("safetensors", "config.json"), load, _JSON),
    Target(
        "safetensors-header",
        _layout("safetensors", "model.safetensors"),
        load,
        (mutation.change_safetensors,),
    ),
    Target("safetensors-index", _layout("safetensors, shards", "*.index.json"), load, _JSON),
    Target("torch-archive", _layout("torch", "pytorch_model.bin"), load, _ARCHIVE),
    Target("torch-index", _layout("torch, shards", "*.index.json"), load, _JSON),
    Target("torch-legacy", _legacy_torch, load, (mutation.change_pickle,)),
    Target("upstream-experts", _upstream("exp00.pt"), load, _ARCHIVE),
    Target("upstream-dense", _upstream("noexp.pt"), load, _ARCHIVE),
    Target("upstream-sizes", _upstream("sizes.pt"), load, _ARCHIVE),
    Target("upstream-config", _upstream("config.json"), load, _JSON),
    Target("t5x-index", _layout("t5x", "checkpoint"), load, (mutation.change_msgpack,)),
    Target("flax-msgpack", _layout("flax msgpack", MODEL), load, (mutation.change_msgpack,)),
    Target("t5x-scanned", _layout("t5x, scanned", "checkpoint"), load, (mutation.change_msgpack,)),
    Target("zarray", _layout("t5x", "target.token_embedder.embedding/.zarray"), load, _ZARR),
    Target(
        "zarr-gzip-chunk",
        _layout("t5x", "target.token_embedder.embedding/0.0"),
        load,
        (mutation.change_gzip,),
    ),
    Target(
        "zarr-blosc-chunk", _compressed_by({"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}), load
    ),
    Target("zarr-zstd-chunk", _compressed_by({"id": "zstd", "level": 1}), load),
    Target(
        "orbax-zarray",
        _layout("orbax, a directory an array", "*token_embedder.embedding/.zarray"),
        load,
        _ZARR,
    ),
    Target("zarr3-json", _zarr3("*.token_embedder.embedding/zarr.json"), load, _ZARR),
    Target("zarr3-chunk", _zarr3("*.token_embedder.embedding/c/0/0"), load),
    Target("orbax-metadata", _layout("orbax, ocdbt", "_METADATA"), load, _JSON),
    Target("orbax-step-metadata", _layout("orbax, ocdbt", "_CHECKPOINT_METADATA"), load, _JSON),
    Target(
        "orbax-placeholders", _layout("orbax, placeholders", "checkpoint"), load, (mutation.change_msgpack,)
    ),
    Target("ocdbt-manifest", _layout("orbax, ocdbt", "manifest.ocdbt"), load, (change_ocdbt,)),
    Target("ocdbt-data", _layout("orbax, ocdbt", "d/*"), load, (change_ocdbt, mutation.change_bytes)),
)
