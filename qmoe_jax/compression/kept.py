"""The parameters that a run keeps as they are: written before the walk, and by a resumed run not again.

Written first, a number in them that is not finite is found before any work, and so is a disk that has no room
for a skipped stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qmoe_jax.artifact.dense import DENSE, METADATA
from qmoe_jax.artifact.manifest import ArrayRecord, canonical, digest, read_canonical
from qmoe_jax.artifact.store import ArtifactWriter
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.staging import staged
from qmoe_jax.compression.finished import FOLDER
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.store import File, make_hold
from qmoe_jax.files.tensor import LazyTensor, Tensor
from qmoe_jax.parameters import is_expert

_RECORD = f"{FOLDER}/{DENSE}.json"


def write_kept(
    writer: ArtifactWriter,
    reader: Checkpoint,
    names: Sequence[str],
    scratch: Path,
    advance: Callable[[int], object],
) -> None:
    """Write the parameters `names`, unless this run did so before. With several hosts, the first calls this.

    Experts whose chunks span several of them are staged in `scratch`. Memory and errors: as of `save_dense`.
    `advance` is called with the number of bytes whenever some were read.
    """
    if (records := _read_records(writer)) is not None:
        writer.keep_dense(records)
        return
    reads = [(name, range(reader.shape(name)[0])) for name in names if is_expert(name)]
    with staged(reader, scratch, reads) as ahead:
        tensors = {name: _counted(ahead.tensors[name], advance) for name in names}
        records = writer.write_dense(tensors, source=reader.path)
    content = {
        "run": writer.run.digest,
        "arrays": {name: dataclasses.asdict(record) for name, record in records.items()},
    }
    make_hold(writer.store, _RECORD, [canonical({"checksum": digest(content), **content})])


def _counted(tensor: Tensor, advance: Callable[[int], object]) -> LazyTensor:
    """Return a tensor that tells how many bytes are read of it."""

    def read(rows: slice) -> np.ndarray:
        array = tensor.read(rows)
        advance(array.nbytes)
        return array

    return LazyTensor(tensor.shape, tensor.dtype, read)


def _read_records(writer: ArtifactWriter) -> dict[str, ArrayRecord] | None:
    """Return the records of what this run wrote; None where it did not, or where they are damaged."""
    if not (writer.store.exists(_RECORD) and writer.store.exists(f"{DENSE}/{METADATA}")):
        return None
    try:
        content = read_canonical(File(writer.store, _RECORD))
    except CheckpointError:
        return None
    if content.pop("checksum", None) != digest(content) or content["run"] != writer.run.digest:
        return None
    return {name: ArrayRecord.from_json(fields) for name, fields in content["arrays"].items()}
