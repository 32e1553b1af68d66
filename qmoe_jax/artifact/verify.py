"""Whether every byte of an artifact is what was written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qmoe_jax.artifact.dense import DENSE, DenseTensor
from qmoe_jax.artifact.kinds import Codebooks
from qmoe_jax.artifact.manifest import MANIFEST, GroupRecord, Manifest
from qmoe_jax.artifact.matrices import unpack_digits
from qmoe_jax.artifact.reader import ArtifactReader, ExpertLayer
from qmoe_jax.artifact.store import REPORT
from qmoe_jax.artifact.sums import SUMS, listed_files, read_sums
from qmoe_jax.files.durable import FileRecord, record_of
from qmoe_jax.files.errors import CheckpointError

Progress = Callable[[int, int], object]
"""Told of the bytes checked so far, and of all."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
      ok: nothing is wrong.
      problems: what is: each names the file, what was expected and what was found.
      files: files checked.
      bytes: bytes checked.
    """

    ok: bool
    problems: tuple[str, ...]
    files: int = 0
    bytes: int = 0


def verify(path: str | Path, progress: Progress | None = None) -> Verification:
    """Reads every file of an artifact and checks it: sizes, checksums, each dense array, each expert's codes.

    A file that is missing, or that no one has listed, is a problem too (README, LICENSE and hidden files
    apart).
    """
    root = Path(path)
    try:
        manifest, sums = Manifest.read(root), read_sums(root)
    except CheckpointError as error:
        return Verification(False, (str(error),))
    found = listed_files(root)
    problems = [*_misplaced(manifest, sums, found)]
    files, more = _check_files(root, manifest, sums, [name for name in found if name in sums], progress)
    problems += [*more, *_check_dense(root, manifest), *_check_experts(root)]
    return Verification(not problems, tuple(problems), len(files), sum(record.bytes for record in files))


def _misplaced(manifest: Manifest, sums: dict[str, str], found: list[str]) -> Iterator[str]:
    """Files that should be there and are not, and the other way round."""
    listed = {group.path for group in manifest.groups} | manifest.files.keys() | {MANIFEST, REPORT}
    expected = listed | {name for name in sums if name.startswith(f"{DENSE}/")}
    yield from (f"{name}: expected a file, found none" for name in sorted(expected - set(found)))
    yield from (f"{name}: expected no such file, found one" for name in sorted(set(found) - expected))
    yield from (
        f"{name}: expected in the list of checksums, not found" for name in sorted(listed - sums.keys())
    )


def _check_files(
    root: Path, manifest: Manifest, sums: dict[str, str], names: list[str], progress: Progress | None
) -> tuple[list[FileRecord], list[str]]:
    """Hashes the files, several at a time, and compares."""
    total, done = sum((root / name).stat().st_size for name in names), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    recorded = {group.path: group.record for group in manifest.groups} | dict(manifest.files)
    problems, records = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, record in zip(
            names, pool.map(lambda name: _record(root / name, count), names), strict=True
        ):
            if isinstance(record, CheckpointError):
                problems.append(str(record))
                continue
            records.append(record)
            if record.sha256 != sums[name]:
                problems.append(f"{name}: expected SHA-256 {sums[name]} (of {SUMS}), found {record.sha256}")
            elif recorded.get(name, record) != record:
                problems.append(f"{name}: expected {recorded[name]}, found {record}")
    return records, problems


def _record(path: Path, count: Callable[[int], object]) -> FileRecord | CheckpointError:
    try:
        return record_of(path, count)
    except CheckpointError as error:
        return error


def _check_dense(root: Path, manifest: Manifest) -> Iterator[str]:
    """Each dense array's content, read as a model reads it."""
    for name, expected in manifest.dense.items():
        try:
            content = DenseTensor(root, name, expected).content()
        except CheckpointError as error:
            yield str(error)
            continue
        if content != expected:
            yield f"{DENSE}: {name}: expected SHA-256 {expected.sha256}, found {content.sha256}"


def _check_experts(root: Path) -> Iterator[str]:
    """Each expert's codes: every row must decode to exactly the width of its matrix."""
    try:
        reader = ArtifactReader.open(root)
    except CheckpointError as error:
        yield str(error)
        return
    for layer in reader.layers.values():
        for group in layer.groups:
            yield from _check_group(layer, group, reader.codebooks)


def _check_group(layer: ExpertLayer, group: GroupRecord, codebooks: Codebooks) -> Iterator[str]:
    number = group.key.start
    try:
        for expert in layer.read(slice(group.key.start, group.key.stop)):
            for matrix in expert.values():
                unpack_digits(matrix, codebooks)
            number += 1
    except (CheckpointError, ValueError) as error:
        yield f"{group.path}: expert {number}: {error}"
