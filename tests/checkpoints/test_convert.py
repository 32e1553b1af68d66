"""Conversion from one format to another and back keeps every bit."""

from pathlib import Path

import numpy as np
import pytest

from qmoe_jax import convert
from qmoe_jax.checkpoints import Checkpoint, open_dense
from qmoe_jax.files.errors import CheckpointError
from tests.helpers.checkpoint_samples import (
    BFLOAT16,
    DATA,
    EXPERTS,
    LAYOUTS,
    TINY,
    memory_checkpoint,
    random_parameters,
)

ORIGINALS = ("hf_tiny_a", "t5x/switch_c_tiny_f32")


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.config, a.names()) == (b.config, b.names())
    for name in a.names():
        x, y = a.read(name), b.read(name)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


@pytest.mark.parametrize("original", ORIGINALS)
def test_converting_there_and_back_keeps_every_bit(original: str, tmp_path: Path) -> None:
    checkpoint = open_dense(DATA / original)
    t5x = open_dense(convert(checkpoint, tmp_path / "t5x", "t5x"))
    huggingface = open_dense(convert(t5x, tmp_path / "huggingface", "huggingface"))
    again = open_dense(convert(huggingface, tmp_path / "again", "t5x", step=1000))
    assert [r.format for r in (t5x, huggingface, again)] == ["t5x", "huggingface", "t5x"]
    assert again.path.name == "checkpoint_1000"  # type: ignore[union-attr]
    for copy in (t5x, huggingface, again):
        assert_same(checkpoint, copy)


@pytest.mark.parametrize("format", ["t5x", "huggingface"])
def test_converting_rounds_on_request(format: str, tmp_path: Path) -> None:
    parameters = random_parameters(dtype=np.dtype(np.float32))
    source = open_dense(LAYOUTS["safetensors"](tmp_path / "source", TINY, parameters))
    checkpoint = open_dense(convert(source, tmp_path / "out", format, dtype=BFLOAT16))  # type: ignore[arg-type]
    assert checkpoint.read(EXPERTS).tobytes() == parameters[EXPERTS].astype(BFLOAT16).tobytes()


@pytest.mark.parametrize("format", ["t5x", "huggingface"])
def test_a_conversion_that_would_overflow_is_refused_by_name(format: str, tmp_path: Path) -> None:
    parameters = random_parameters(dtype=np.dtype(np.float32))
    parameters[EXPERTS][3, 2, 1] = 3.4e38
    source = memory_checkpoint(TINY, parameters)
    with pytest.raises(CheckpointError, match="beyond the range of bfloat16") as raised:
        convert(source, tmp_path / "out", format, dtype=BFLOAT16)  # type: ignore[arg-type]
    assert raised.value.key == f"{EXPERTS}, expert 3, element [2, 1]"


@pytest.mark.parametrize("format", ["t5x", "huggingface"])
def test_a_conversion_copies_what_is_not_finite(format: str, tmp_path: Path) -> None:
    parameters = random_parameters()
    parameters[EXPERTS][3, 2, :2] = np.nan, np.inf
    source = memory_checkpoint(TINY, parameters)
    copy = open_dense(convert(source, tmp_path / "out", format))  # type: ignore[arg-type]
    assert copy.read(EXPERTS).tobytes() == parameters[EXPERTS].tobytes()


def test_converting_to_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'gguf'"):
        convert(open_dense(DATA / "hf_tiny_a"), tmp_path / "out", "gguf")  # type: ignore[arg-type]
