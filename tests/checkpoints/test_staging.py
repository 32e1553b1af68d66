"""Staging reads every chunk once, ahead of the reader, and keeps few blocks on the disk."""

import dataclasses
import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from qmoe_jax.checkpoints import Checkpoint, CheckpointError, open_dense, staging
from qmoe_jax.checkpoints.staging import StagingStatistics, staged
from qmoe_jax.checkpoints.t5x import write_parameters
from qmoe_jax.checkpoints.t5x.reader import stored_name
from tests.helpers.checkpoint_samples import EXPERTS, TINY, memory_checkpoint, nested, random_parameters

CHUNKS = [2, 3, 5]  # of [5, 8, 12]: no axis divides evenly
OTHERS = EXPERTS.replace("wi", "wo")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    parameters = random_parameters()
    path = write_parameters(nested(parameters), tmp_path / "model", step=3)
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


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


@dataclasses.dataclass
class Recorded:
    """A tensor in chunks of two rows and three columns that records which rows are read.

    Attributes:
        array: its content.
        reads: the first rows of the blocks that were read.
        gate: blocks wait for it between their first piece and their second.
        begun: set when a first piece was read.
    """

    array: np.ndarray
    reads: list[int] = dataclasses.field(default_factory=list)
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)
    begun: threading.Event = dataclasses.field(default_factory=threading.Event)
    rows_per_chunk = 2

    def __post_init__(self) -> None:
        self.gate.set()
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def read(self, rows: slice) -> np.ndarray:
        self.reads.append(rows.start)
        return self.array[rows].copy()

    def read_columns(self, rows: slice) -> Iterator[np.ndarray]:
        self.reads.append(rows.start)
        for start in range(0, self.shape[1], 3):
            yield self.array[rows, start : start + 3].copy()
            self.begun.set()
            assert self.gate.wait(10)


@pytest.fixture
def recorded() -> tuple[Checkpoint, dict[str, Recorded]]:
    """A checkpoint whose kernels `EXPERTS` and `OTHERS` are recorded, of 9 experts."""
    config = dataclasses.replace(TINY, num_experts=9)
    parameters = random_parameters(config)
    tensors = {name: Recorded(parameters[name]) for name in (EXPERTS, OTHERS)}
    checkpoint = memory_checkpoint(config, parameters)
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **tensors}), tensors


def groups(name: str, size: int, count: int, start: int = 0) -> list[tuple[str, range]]:
    return [(name, range(first, min(first + size, count))) for first in range(start, count, size)]


def read(checkpoint: Checkpoint, name: str, experts: range) -> bytes:
    return checkpoint.read(name, slice(experts.start, experts.stop)).tobytes()


def blocks(scratch: Path) -> dict[str, int]:
    """Sizes of the files of blocks."""
    return {file.name: file.stat().st_size for file in scratch.rglob("*kernel*")}


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_staged_experts_are_the_same(checkpoint: Checkpoint, size: int, scratch: Path) -> None:
    want = random_parameters()
    with staged(checkpoint, scratch, groups(EXPERTS, size, 5)) as experts:
        assert (experts.config, experts.names()) == (TINY, sorted(want))
        for name, part in groups(EXPERTS, size, 5):
            assert read(experts, name, part) == want[EXPERTS][part.start : part.stop].tobytes()
            assert read(experts, OTHERS, part) == want[OTHERS][part.start : part.stop].tobytes()
        scale = "encoder/encoder_norm/scale"
        assert experts.read(scale).tobytes() == want[scale].tobytes()
    assert not list(scratch.iterdir())


def test_every_chunk_is_read_once(checkpoint: Checkpoint, scratch: Path) -> None:
    """Proven by deleting them: without a fill value, reading a chunk again would be an error."""
    directory, statistics = Path(checkpoint.path) / stored_name(EXPERTS), StagingStatistics()
    with staged(checkpoint, scratch, groups(EXPERTS, 1, 5), statistics) as experts:
        for name, part in groups(EXPERTS, 1, 5):
            read(experts, name, part)
            for chunk in directory.glob(f"{part.start // 2}.*"):
                chunk.unlink()
        assert statistics.needed_bytes == statistics.read_bytes == 5 * 8 * 12 * 2
        assert statistics.over_read == 1
        with pytest.raises(CheckpointError, match="missing"):
            experts.read(EXPERTS, slice(0, 1))


def test_one_block_of_each_matrix_is_staged_ahead(recorded, scratch: Path, monkeypatch) -> None:
    checkpoint, tensors = recorded
    reads = [part for pair in zip(groups(EXPERTS, 2, 9), groups(OTHERS, 2, 9), strict=True) for part in pair]
    allocate, most = staging.allocate, []

    def measured(descriptor: int, size: int) -> None:
        most.append(len(blocks(scratch)))
        allocate(descriptor, size)

    monkeypatch.setattr(staging, "allocate", measured)
    with staged(checkpoint, scratch, reads) as experts:
        for done, (name, part) in enumerate(reads):
            for kernel, own in ((EXPERTS, (done + 1) // 2), (OTHERS, done // 2)):
                ahead = [0, 2, 4, 6, 8][: own + 2]
                wait_for(lambda kernel=kernel, ahead=ahead: tensors[kernel].reads == ahead)
            assert read(experts, name, part) == tensors[name].array[part.start : part.stop].tobytes()
    assert max(most) == 4


def test_a_block_goes_with_its_last_read(recorded, scratch: Path) -> None:
    checkpoint, tensors = recorded
    row = tensors[EXPERTS].array[0].nbytes
    sizes = lambda *found: {f"encoder.layers_1.mlp.expert.wi.kernel.{b}": n * row for b, n in found}
    with staged(checkpoint, scratch, groups(EXPERTS, 1, 9)) as experts:
        wait_for(lambda: blocks(scratch) == sizes((0, 2), (1, 2)))
        experts.read(EXPERTS, slice(0, 1))
        assert blocks(scratch) == sizes((0, 2), (1, 2))
        experts.read(EXPERTS, slice(1, 2))
        wait_for(lambda: blocks(scratch) == sizes((1, 2), (2, 2)))
        for expert in range(2, 9):
            experts.read(EXPERTS, slice(expert, expert + 1))
        assert not blocks(scratch)


def test_only_experts_that_are_left_are_written(recorded, scratch: Path) -> None:
    """A resumed run, within a block; and a slice that ends within one."""
    checkpoint, tensors = recorded
    statistics, row = StagingStatistics(), tensors[EXPERTS].array[0].nbytes
    reads = [(EXPERTS, range(1, 2)), (EXPERTS, range(4, 5))]
    with staged(checkpoint, scratch, reads, statistics) as experts:
        wait_for(lambda: list(blocks(scratch).values()) == [row, row])
        for name, part in reads:
            assert read(experts, name, part) == tensors[name].array[part.start : part.stop].tobytes()
    assert tensors[EXPERTS].reads == [1, 4]
    assert statistics.over_read == 2


def test_a_read_may_span_more_blocks_than_are_staged_ahead(recorded, scratch: Path) -> None:
    checkpoint, tensors = recorded
    reads = [(EXPERTS, range(1, 8)), (EXPERTS, range(8, 9)), (EXPERTS, range(1))]
    with staged(checkpoint, scratch, reads) as experts:
        for name, part in reads:
            assert read(experts, name, part) == tensors[name].array[part.start : part.stop].tobytes()
    assert sorted(tensors[EXPERTS].reads) == [0, 2, 4, 6, 8]


def test_another_order_is_only_slower(recorded, scratch: Path) -> None:
    checkpoint, tensors = recorded
    with staged(checkpoint, scratch, groups(EXPERTS, 2, 9)) as experts:
        for name, part in reversed(groups(EXPERTS, 2, 9)):
            assert read(experts, name, part) == tensors[name].array[part.start : part.stop].tobytes()
    assert sorted(tensors[EXPERTS].reads) == [0, 2, 4, 6, 8]


def test_an_expert_that_is_not_announced_is_read_where_it_is(recorded, scratch: Path) -> None:
    checkpoint, tensors = recorded
    statistics = StagingStatistics()
    with staged(checkpoint, scratch, [(EXPERTS, range(2))], statistics) as experts:
        for part in (range(2), range(2), range(3, 6), range(3, 3)):
            assert read(experts, EXPERTS, part) == tensors[EXPERTS].array[part.start : part.stop].tobytes()
    assert tensors[EXPERTS].reads == [0, 0, 3, 4]
    assert statistics.over_read == 8 / 7


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ([(EXPERTS, range(2)), (EXPERTS, range(1, 3))], "twice"),
        ([(EXPERTS, range(8, 10))], "9 experts"),
        ([("encoder/encoder_norm/scale", range(1))], "0 experts"),
    ],
)
def test_announcements_are_checked(recorded, scratch: Path, reads, message: str) -> None:
    with pytest.raises(ValueError, match=message), staged(recorded[0], scratch, reads):
        pass
    assert not list(scratch.iterdir())


def test_a_damaged_chunk_is_an_error_of_its_reader(checkpoint: Checkpoint, scratch: Path) -> None:
    (Path(checkpoint.path) / stored_name(EXPERTS) / "1.2.2").unlink()
    with staged(checkpoint, scratch, groups(EXPERTS, 2, 5)) as experts:
        assert experts.read(EXPERTS, slice(0, 2)).tobytes() == random_parameters()[EXPERTS][:2].tobytes()
        for first in (2, 4):
            with pytest.raises(CheckpointError, match=r"1\.2\.2"):
                experts.read(EXPERTS, slice(first, first + 1))


def test_a_full_disk_is_an_error_of_its_reader(recorded, scratch: Path, monkeypatch) -> None:
    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging, "allocate", full)
    with staged(recorded[0], scratch, groups(EXPERTS, 2, 9)) as experts:
        with pytest.raises(CheckpointError, match=r"cannot be staged here[^$]*bytes free") as caught:
            experts.read(EXPERTS, slice(0, 2))
        assert "free some space" in str(caught.value)


def test_leaving_the_context_stops_within_a_block(recorded, scratch: Path, monkeypatch) -> None:
    checkpoint, tensors = recorded
    tensors[EXPERTS].gate.clear()
    stop = staging._Staging.stop
    monkeypatch.setattr(staging._Staging, "stop", lambda self: (stop(self), tensors[EXPERTS].gate.set()))
    with staged(checkpoint, scratch, groups(EXPERTS, 2, 9)) as experts:
        assert tensors[EXPERTS].begun.wait(10)
    assert tensors[EXPERTS].reads == [0]
    assert not list(scratch.iterdir())
    with pytest.raises(ValueError, match="after the end"):
        experts.read(EXPERTS, slice(0, 2))
