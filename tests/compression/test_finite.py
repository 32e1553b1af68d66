"""Numbers that are not finite stop a compression where they are first read or made, by name."""

import dataclasses

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.files.tensor import in_memory

WI, WO = (f"encoder/layers_1/mlp/expert/{matrix}/kernel" for matrix in ("wi", "wo"))
NORM = "encoder/layers_1/pre_mlp_layer_norm/scale"
ATTENTION = "encoder/layers_0/attention/out/kernel"
SKIPPED = "decoder/layers_1/mlp/expert/wo/kernel"


def damaged(data, **values):
    """Return the tiny model with `values` at places of its tensors."""
    reader, tensors = qj.open_checkpoint(data / "hf_tiny_a"), {}
    for name, (place, value) in values.items():
        array = reader.read(name)
        array[place] = value
        tensors[name] = in_memory(array)
    return dataclasses.replace(reader, tensors={**reader.tensors, **tensors})


@pytest.mark.parametrize(
    ("values", "options", "problem", "key"),
    [
        ({WI: ((2, 5, 7), np.nan)}, {}, "not finite", f"{WI}, expert 2, element [5, 7]"),
        ({WI: ((0, 5, 7), -np.inf)}, {}, "not finite", f"{WI}, expert 0, element [5, 7]"),
        ({WO: ((7, 0, 1), np.inf)}, {}, "not finite", f"{WO}, expert 7, element [0, 1]"),
        ({NORM: ((3,), np.nan)}, {}, "not finite", f"{NORM}, element [3]"),
        ({SKIPPED: ((6, 1, 2), np.nan)}, {"skip": "decoder"}, "not finite", f"{SKIPPED}, expert 6"),
        ({WO: ((4, 0, 1), 3.4e38)}, {}, "range of bfloat16", f"{WO}, levels, expert 4, element [1, 0, 1]"),
        ({WI: (3, 1e25)}, {"method": "gptq"}, "overflow", f"{WO}, expert 3"),
        ({WI: (3, 1e25)}, {}, "overflows in float32", "encoder layer 1, experts"),
        ({ATTENTION: ((), 1e25)}, {}, "overflows in float32", "encoder layer 0, attention"),
    ],
    ids=range(9),
)
def test_a_compression_names_what_is_not_finite(data, samples, tmp_path, values, options, problem, key):
    config = qj.CompressionConfig(sentinel_start=480, **{"method": "nearest", **options})
    with pytest.raises(qj.CheckpointError, match=problem) as raised:
        qj.compress(damaged(data, **values), tmp_path / "out", samples[:4], config)
    assert raised.value.key.startswith(key)
    assert not (tmp_path / "out/manifest.json").exists()
