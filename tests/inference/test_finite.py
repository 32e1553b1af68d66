"""Numbers that are not finite are refused by name, in loading, generation and evaluation."""

import dataclasses
import shutil

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.files.tensor import in_memory

NORM = "encoder/encoder_norm/scale"
NAN = b"\xc0\x7f"  # bfloat16


@pytest.mark.parametrize("experts", ["device", "host", "disk"])
def test_levels_that_are_not_finite_are_refused_in_every_placement(artifact, tmp_path, experts):
    path, examples = artifact
    copy = shutil.copytree(path, tmp_path / "model")
    reader = qj.open_checkpoint(copy)
    for expert in range(8):  # the disk's are read where tokens are routed to them
        extent = reader.expert_extent("encoder", 1, expert)
        place = next(
            begin
            for part, begin in zip(extent.group.parts, extent.group.offsets[expert], strict=False)
            if (part.matrix, part.part) == ("wo", "levels")
        )
        with open(extent.path, "r+b") as file:
            file.seek(extent.group.data_begin + int(place))
            file.write(NAN)
    with pytest.raises(qj.CheckpointError, match=r"encoder.layers_01(.|\n)*expert \d, wo(.|\n)*finite"):
        qj.evaluate(*qj.load_compressed(copy, experts=experts), examples)


@pytest.mark.parametrize(
    ("dtype", "value", "problem"),
    [("float32", np.nan, "not finite"), ("bfloat16", 3.4e38, "range of bfloat16")],
)
def test_a_dense_parameter_is_checked_as_it_is_loaded(data, dtype, value, problem):
    reader = qj.open_checkpoint(data / "hf_tiny_a")
    scale = reader.read(NORM)
    scale[5] = value
    reader = dataclasses.replace(reader, tensors={**reader.tensors, NORM: in_memory(scale)})
    with pytest.raises(qj.CheckpointError, match=problem) as raised:
        qj.load_model(reader, dtype)
    assert raised.value.key == f"{NORM}, element [5]"


def overflowing(params, value):
    """Return the parameters with a norm's scale of `value` in the decoder's second layer."""
    layer = params["decoder"]["layers_1"]
    norm = {"scale": np.full_like(layer["pre_mlp_layer_norm"]["scale"], value)}
    decoder = {**params["decoder"], "layers_1": {**layer, "pre_mlp_layer_norm": norm}}
    return {**params, "decoder": decoder}


def test_generation_and_evaluation_name_the_part_that_overflows(artifact):
    path, examples = artifact
    model, params = qj.load_compressed(path)
    params = overflowing(params, np.inf)
    where = "^decoder/layers_1/pre_mlp_layer_norm: .*not finite in float32"
    with pytest.raises(ValueError, match=where):
        qj.generate(model, params, examples[0][0][None], max_new_tokens=2)
    with pytest.raises(ValueError, match=where):
        qj.evaluate(model, params, examples[:1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", np.nan), ("temperature", np.inf), ("top_p", np.nan), ("top_k", np.nan)],
)
def test_sampling_options_that_are_not_finite_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        qj.Sampling(**{field: value})
