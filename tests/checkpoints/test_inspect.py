"""Counts of `inspect`, and switch-c-2048 in its true shape: 1.57 trillion parameters in a few kilobytes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from flax import serialization

from qmoe_jax.artifact.inspect import inspect
from qmoe_jax.checkpoints import open_dense
from qmoe_jax.checkpoints.architecture import expected_shapes
from qmoe_jax.checkpoints.t5x.reader import stored_name
from qmoe_jax.checkpoints.t5x.writer import chunk_shape
from qmoe_jax.config import PRESETS
from tests.helpers.checkpoint_samples import LAYOUTS, TINY, nested, random_parameters

WI = "decoder/layers_14/mlp/expert/wi/kernel"


@pytest.mark.parametrize("layout", ["t5x", "safetensors, shards", "orbax, ocdbt"])
def test_inspect_counts_parameters_layers_and_bytes(layout: str, tmp_path: Path) -> None:
    parameters = random_parameters()
    counts = inspect(open_dense(LAYOUTS[layout](tmp_path / "model", TINY, parameters)))
    size = sum(array.size for array in parameters.values())
    assert (counts.parameters, counts.expert_parameters) == (size, TINY.expert_parameters)
    assert counts.dtypes == {"bfloat16": size}
    assert counts.memory["bfloat16"] == 2 * size
    assert [(layer.stack, layer.index, layer.experts) for layer in counts.layers] == [
        *(("encoder", i, e) for i, e in enumerate((0, 5, 0, 5))),
        *(("decoder", i, 5) for i in (0, 1)),
    ]
    rest = sum(array.size for name, array in parameters.items() if "layers_" not in name)
    assert sum(layer.parameters for layer in counts.layers) == size - rest
    on_disk = sum(file.stat().st_size for file in (tmp_path / "model").rglob("*") if file.is_file())
    assert counts.bytes_on_disk is not None
    assert 0.5 * on_disk < counts.bytes_on_disk <= on_disk
    assert (counts.damaged, counts.preset) == ((), None)


def test_inspect_shows_damage_of_a_checkpoint_opened_without_a_check(tmp_path: Path) -> None:
    path = LAYOUTS["t5x"](tmp_path / "model", TINY, random_parameters())
    (path / "target.encoder.encoder_norm.scale" / "0").unlink()
    (damaged,) = inspect(open_dense(path, check=False)).damaged
    assert (damaged.name, damaged.problem) == ("target.encoder.encoder_norm.scale/0", "missing")


def write_true_shape(directory: Path, experts_with_values: int) -> None:
    """Write a T5X checkpoint of switch-c-2048 in which all chunks but one are missing (the fill value)."""
    target: dict = {}
    for name, shape in expected_shapes(PRESETS["switch-c-2048"]).items():
        metadata = {
            "chunks": chunk_shape(shape, 4),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(shape),
        }
        array = directory / stored_name(name)
        array.mkdir(parents=True)
        zarray = {"dtype": "<f4", "fill_value": 0.0, "filters": None, "order": "C", "zarr_format": 2}
        (array / ".zarray").write_text(json.dumps(metadata | zarray))
        kvstore = {"driver": "gfile", "path": f"{stored_name(name)}/"}
        target[name] = {"driver": "zarr", "dtype": "float32", "kvstore": kvstore, "metadata": metadata}
    tree = {"version": 3, "optimizer": {"target": nested(target), "state": {"step": np.int32(611800)}}}
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    kvstore = {"driver": "file", "path": f"{directory / stored_name(WI)}/"}
    store = ts.open({"driver": "zarr", "kvstore": kvstore}).result()
    store[:experts_with_values, :208, :256].write(np.float32(1)).result()


PROGRAM = """
import pathlib, re, sys, time
from qmoe_jax.checkpoints import open_dense
from qmoe_jax.artifact.inspect import inspect
begin = time.perf_counter()
counts = inspect(open_dense(sys.argv[1]))
seconds = time.perf_counter() - begin
peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
gigabytes = int(peak[1]) / 2**20  # of this program alone: ru_maxrss would count the process that forked it
print(counts.preset, counts.parameters, *list(counts.memory.values())[:2], seconds, gigabytes)
"""


def test_c_2048_in_its_true_shape_is_opened_in_seconds_and_read_in_parts(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint_611800"
    write_true_shape(directory, experts_with_values=3)
    assert sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) < 2**20

    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    preset, parameters, bfloat16, ternary, seconds, gigabytes = ran.stdout.split()
    assert (preset, int(parameters)) == ("switch-c-2048", 1_571_327_875_360)
    assert int(bfloat16) == 2 * int(parameters)
    assert 135e9 < int(ternary) < 150e9  # fits one GPU of 150.7 GB
    assert float(seconds) < 5
    assert float(gigabytes) < 1

    checkpoint = open_dense(directory, check=False)
    assert checkpoint.config == PRESETS["switch-c-2048"]
    assert checkpoint.tensors[WI].rows_per_chunk == 256  # type: ignore[attr-defined]
    experts = checkpoint.read(WI, slice(2, 4))
    assert experts.shape == (2, 2080, 6144)
    assert experts.sum() == math.prod((208, 256))
    assert (experts[0, :208, :256] == 1).all()
