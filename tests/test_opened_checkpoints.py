"""Functions of the API take a path or an opened checkpoint, with the same result."""

import jax
import numpy as np
import pytest

import qmoe_jax as qj


@pytest.fixture
def path(data):
    return data / "hf_tiny_a"


@pytest.fixture
def opened(path):
    return qj.open_checkpoint(path)


def test_an_opened_checkpoint_is_returned_as_it_is(opened):
    assert qj.open_checkpoint(opened) is opened


def test_inspect_takes_a_path_or_an_opened_checkpoint(path, opened):
    assert qj.inspect(opened) == qj.inspect(path)


def test_load_model_takes_a_path_or_an_opened_checkpoint(path, opened):
    (model, params), (expected, expected_params) = qj.load_model(opened), qj.load_model(str(path))
    assert model == expected
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)


def test_convert_takes_a_path_or_an_opened_checkpoint(path, opened, tmp_path):
    calls = []
    progress = lambda done, total, label: calls.append((done, total))
    first = qj.convert(opened, tmp_path / "a", "huggingface", progress=progress)
    second = qj.convert(path, tmp_path / "b", to="huggingface")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert calls[0][0] == 0 and calls[-1][0] == calls[-1][1] > 0


def test_a_dense_checkpoint_is_not_converted_to_upstreams_format(opened, tmp_path):
    with pytest.raises(qj.CheckpointError, match="compress it first"):
        qj.convert(opened, tmp_path / "out", "upstream")
    with pytest.raises(ValueError, match="'gguf'"):
        qj.convert(opened, tmp_path / "out", "gguf")
