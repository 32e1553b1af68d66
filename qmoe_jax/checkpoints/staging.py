"""Experts in the order they are used: chunks that span many experts are read once, ahead of the reader.

T5X cuts an expert kernel into chunks that span many experts: those of switch-c-2048 are [256, 208, 256] of
[2048, 2080, 6144], so reading 16 experts at a time would decompress every chunk 16 times. Here a thread
copies block after block (the experts that the same chunks hold) to scratch files, in the order in which they
will be read, while the caller computes on the blocks before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.files.errors import system_error
from qmoe_jax.files.reading import read_array
from qmoe_jax.files.space import allocate
from qmoe_jax.files.tensor import ChunkedTensor, LazyTensor
from qmoe_jax.parameters import ExpertKernel, is_expert

BLOCKS_PER_MATRIX = 2
"""Blocks of each matrix (wi, wo) on the disk at a time: the one that is read, and the one after it."""


@dataclasses.dataclass
class StagingStatistics:
    """The work of staging, for a report. Kernels whose chunks hold single experts do not count.

    Attributes:
        needed_bytes: size of the experts that were staged, or read otherwise.
        read_bytes: size of all experts in the chunks that were decoded for them.
        staging_seconds: time the thread spent on reading and copying blocks.
        waiting_seconds: time the readers waited for blocks.
    """

    needed_bytes: int = 0
    read_bytes: int = 0
    staging_seconds: float = 0.0
    waiting_seconds: float = 0.0

    @property
    def over_read(self) -> float:
        """Bytes decoded for each byte needed: 1 where every chunk was read once and used in full."""
        return self.read_bytes / self.needed_bytes if self.needed_bytes else 1.0


@contextlib.contextmanager
def staged(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    reads: Iterable[tuple[str, range]],
    statistics: StagingStatistics | None = None,
) -> Iterator[Checkpoint]:
    """Yield a checkpoint whose experts are staged ahead of the reader where chunks span several of them.

    A reader that follows the order of `reads` waits only for the first block, and where it is faster than
    staging. In any other order, the blocks that a reader waits for are staged next. Experts that are not
    named, or were read before, are read where they are: `over_read` shows it. Several threads may read.

    The files lie in `directory`. A block has the experts that `reads` names, and is removed when all of them
    were read; all are removed when the context ends, after the piece under way. Disk: `BLOCKS_PER_MATRIX`
    blocks of each matrix, more only where one read spans more; for c-2048 13.4 GB each, 54 GB in all. Memory:
    the named experts of a block in as many columns as a chunk spans (1.3 GB there), and the chunks that make
    them.

    Args:
        checkpoint: where the experts are read from.
        directory: an existing folder.
        reads: kernels and ranges of their experts in the order in which they will be read. An expert is named
            and read once; the ranges that are read need not be these.
        statistics: to which the work is added.

    Raises:
        CheckpointError: a name is not a parameter. Reading raises what staging met: a damaged chunk, a full
            disk.
        ValueError: `reads` names an expert twice, or one that does not exist. Reading after the end of the
            context.
    """
    statistics = StagingStatistics() if statistics is None else statistics
    with tempfile.TemporaryDirectory(prefix="experts-", dir=directory) as scratch:
        staging = _Staging(checkpoint, Path(scratch), reads, statistics)
        tensors = dict(checkpoint.tensors)
        for name in staging.kernels:
            tensor = checkpoint.tensors[name]
            tensors[name] = LazyTensor(tensor.shape, tensor.dtype, partial(staging.read, name))
        thread = threading.Thread(target=staging.run, name="staging", daemon=True)
        thread.start()
        try:
            yield dataclasses.replace(checkpoint, tensors=tensors)
        finally:
            staging.stop()
            thread.join()


@dataclasses.dataclass(eq=False)
class _Block:
    """The named experts among those that the same chunks of a kernel hold, one after another in a file.

    Attributes:
        kernel: which.
        tensor: its content.
        span: the experts that the chunks hold.
        file: the scratch file.
        rows: the experts that are named, in the order in which the file holds them.
        unread: those that no reader has asked for.
        left: number of those that have not been read.
        wanted: a reader waits for it.
        ready: its file is complete.
    """

    kernel: ExpertKernel
    tensor: ChunkedTensor
    span: range
    file: Path
    rows: list[int] = dataclasses.field(default_factory=list)
    unread: set[int] = dataclasses.field(default_factory=set)
    left: int = 0
    wanted: bool = False
    ready: bool = False

    @property
    def row_bytes(self) -> int:
        return math.prod(self.tensor.shape[1:]) * self.tensor.dtype.itemsize

    def copy(self, stopped: threading.Event) -> None:
        """Write the file. Raises `CheckpointError` where a chunk is damaged or the disk is full."""
        size, first, column = len(self.rows) * self.row_bytes, self.rows[0], 0
        try:
            with open(self.file, "wb") as stream:
                allocate(stream.fileno(), size)
                for piece in self.tensor.read_columns(slice(first, self.rows[-1] + 1)):
                    for place, row in enumerate(self.rows):
                        stream.seek(place * self.row_bytes + column)
                        values = np.ascontiguousarray(piece[row - first])
                        stream.write(values.reshape(-1).view(np.uint8).data)
                    column += values.nbytes
                    del piece, values  # before the next piece is read
                    if stopped.is_set():
                        return
        except OSError as error:
            raise system_error(
                "experts cannot be staged here", self.file.parent, error, expected=f"{size:,} bytes free"
            ) from error

    def read(self, rows: range, out: np.ndarray) -> None:
        """Fill an array with consecutive rows of the file."""
        read_array(self.file, self.rows.index(rows.start) * self.row_bytes, out, self.kernel.path)


class _Staging:
    """The blocks of a run: one thread stages them, others read.

    Attributes:
        kernels: names of those whose chunks span several experts, and of which any are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scratch: Path,
        reads: Iterable[tuple[str, range]],
        statistics: StagingStatistics,
    ):
        self.kernels: dict[str, ChunkedTensor] = {}
        self._scratch, self._statistics = scratch, statistics
        self._blocks: dict[tuple[str, int], _Block] = {}  # by kernel and number
        for name, experts in reads:
            count = checkpoint.shape(name)[0] if is_expert(name) else 0
            if experts.step != 1 or not 0 <= experts.start <= experts.stop <= count:
                raise ValueError(f"{name}: expected a range of its {count} experts, found {experts}")
            tensor = checkpoint.tensors[name]
            if isinstance(tensor, ChunkedTensor) and tensor.rows_per_chunk > 1:
                self.kernels[name] = tensor
                self._name(name, experts)
        self._queue = list(self._blocks.values())  # in the order in which they will be read
        self._on_disk: list[_Block] = []
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._changed = threading.Condition()  # held to read or change the state of blocks

    def _name(self, name: str, experts: range) -> None:
        for block, rows in self._parts(name, experts):
            if not block.unread.isdisjoint(rows):
                raise ValueError(f"{name}: experts of {experts} are named twice")
            block.unread.update(rows)
            block.rows, block.left = sorted(block.unread), len(block.unread)

    def _parts(self, name: str, experts: range) -> Iterator[tuple[_Block, range]]:
        """Yield the blocks that hold a range of experts, each with the experts it holds."""
        tensor = self.kernels[name]
        size, end = tensor.rows_per_chunk, tensor.shape[0]
        for number in range(experts.start // size, -(-experts.stop // size) if experts else 0):
            span = range(number * size, min((number + 1) * size, end))
            if (block := self._blocks.get((name, number))) is None:
                file = self._scratch / f"{name.replace('/', '.')}.{number}"
                block = self._blocks[name, number] = _Block(ExpertKernel.parse(name), tensor, span, file)
            yield block, range(max(experts.start, span.start), min(experts.stop, span.stop))

    def run(self) -> None:
        """Stage block after block, until none is left, one fails, or `stop` is called."""
        while (block := self._next()) is not None:
            began = time.monotonic()
            try:
                block.copy(self._stopped)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                block.ready = True
                self._statistics.staging_seconds += time.monotonic() - began
                self._count(block, len(block.rows))
                self._changed.notify_all()

    def stop(self) -> None:
        """Have `run` return, and readers that wait."""
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Return experts of a kernel. Raises what staging met, or the tensor's own errors."""
        tensor = self.kernels[name]
        array = np.empty((rows.stop - rows.start, *tensor.shape[1:]), tensor.dtype)
        for block, part in self._parts(name, range(rows.start, rows.stop)):
            out = array[part.start - rows.start : part.stop - rows.start]
            if self._claim(block, part):
                block.read(part, out)
                self._release(block, part)
            else:
                out[...] = tensor.read(slice(part.start, part.stop))
        return array

    def _claim(self, block: _Block, rows: range) -> bool:
        """Wait until a block is staged for its reader; return False where it will not hold the rows."""
        began = time.monotonic()
        with self._changed:
            if not block.unread.issuperset(rows):
                self._count(block, len(rows))
                return False
            block.unread.difference_update(rows)
            block.wanted = True
            self._changed.notify_all()
            while not (block.ready or self._error or self._stopped.is_set()):
                self._changed.wait()
            self._statistics.waiting_seconds += time.monotonic() - began
            if self._stopped.is_set():
                raise ValueError(f"{block.kernel.path}: is read after the end of the context that stages it")
            if not block.ready and self._error:
                raise self._error
            return True

    def _release(self, block: _Block, rows: range) -> None:
        """Note that rows were read, and remove the file after the last of them."""
        with self._changed:
            block.left -= len(rows)
            if not block.left:
                block.file.unlink(missing_ok=True)
                self._on_disk.remove(block)
                self._changed.notify_all()

    def _next(self) -> _Block | None:
        """Wait until a block may be staged, and return it; None at the end."""
        with self._changed:
            while self._queue and not self._stopped.is_set():
                if (block := self._choose()) is not None:
                    self._queue.remove(block)
                    self._on_disk.append(block)
                    return block
                self._changed.wait()
        return None

    def _choose(self) -> _Block | None:
        """Return a block that a reader waits for, else the first that there is room for; None without one."""
        matrices = Counter(block.kernel.matrix for block in self._on_disk)
        room = (block for block in self._queue if matrices[block.kernel.matrix] < BLOCKS_PER_MATRIX)
        return next((block for block in self._queue if block.wanted), next(room, None))

    def _count(self, block: _Block, rows: int) -> None:
        self._statistics.needed_bytes += rows * block.row_bytes
        self._statistics.read_bytes += len(block.span) * block.row_bytes
