"""Staging reads every chunk once, whatever groups of experts are asked for."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from qmoe_jax.checkpoints import Checkpoint, CheckpointError, open_dense
from qmoe_jax.checkpoints.staging import staged
from qmoe_jax.checkpoints.t5x import write_parameters
from qmoe_jax.checkpoints.t5x.reader import stored_name
from tests.helpers.checkpoint_samples import EXPERTS, TINY, nested, random_parameters

CHUNKS = [2, 3, 5]  # of [5, 8, 12]: no axis divides evenly


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    parameters = random_parameters()
    path = write_parameters(nested(parameters), tmp_path, step=3)
    for file in (path / stored_name(EXPERTS)).iterdir():
        file.unlink()
    spec = {
        "driver": "zarr",
        "dtype": "bfloat16",
        "kvstore": {"driver": "file", "path": f"{path / stored_name(EXPERTS)}/"},
        "metadata": {"shape": [5, 8, 12], "chunks": CHUNKS},
    }
    ts.open(spec, create=True).result().write(parameters[EXPERTS]).result()
    return open_dense(path, check=False)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_staged_experts_are_the_same(checkpoint: Checkpoint, size: int, tmp_path: Path) -> None:
    want = random_parameters()
    with staged(checkpoint, tmp_path) as experts:
        assert (experts.config, experts.names()) == (TINY, sorted(want))
        for start in range(0, 5, size):
            part = slice(start, start + size)
            assert experts.read(EXPERTS, part).tobytes() == want[EXPERTS][part].tobytes()
        scale = "encoder/encoder_norm/scale"
        assert experts.read(scale).tobytes() == want[scale].tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_3"]


def test_staging_reads_each_chunk_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Proven by deleting them: without a fill value, reading a chunk again would be an error."""
    directory = Path(checkpoint.path) / stored_name(EXPERTS)
    with staged(checkpoint, tmp_path) as experts:
        for expert in range(5):
            assert np.isfinite(experts.read(EXPERTS, slice(expert, expert + 1)).astype(np.float32)).all()
            for chunk in directory.glob(f"{expert // 2}.*"):
                chunk.unlink()
        with pytest.raises(CheckpointError, match="missing"):
            experts.read(EXPERTS, slice(0, 1))


def test_a_block_that_failed_is_staged_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    chunk = Path(checkpoint.path) / stored_name(EXPERTS) / "0.2.2"
    data = chunk.read_bytes()
    chunk.unlink()
    with staged(checkpoint, tmp_path) as experts:
        with pytest.raises(CheckpointError, match=r"0\.2\.2"):
            experts.read(EXPERTS, slice(0, 1))
        chunk.write_bytes(data)
        assert experts.read(EXPERTS, slice(0, 2)).tobytes() == random_parameters()[EXPERTS][:2].tobytes()
