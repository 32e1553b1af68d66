"""Verification of every byte of an artifact."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from qmoe_jax.artifact.dense import DENSE, stored_record
from qmoe_jax.artifact.kinds import Codebooks
from qmoe_jax.artifact.manifest import MANIFEST, REPORT, GroupRecord, Manifest
from qmoe_jax.artifact.matrices import unpack_digits
from qmoe_jax.artifact.reader import ArtifactReader, ExpertLayer
from qmoe_jax.artifact.sums import SUMS, listed_files, read_sums
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.files.durable import FileRecord
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.store import Place, Store, open_store
from qmoe_jax.progress import ProgressCallback, Tally, no_progress
from qmoe_jax.settings import own_settings

REMEDY = (
    "copy the artifact again, or run the compression that made it again, into the same directory: it makes "
    "what is damaged or missing anew; remove files that do not belong there"
)


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        ok: true without problems.
        problems: each names the file, what was expected and what was found.
        files: number of files checked.
        bytes: number of bytes checked.
    """

    ok: bool
    problems: tuple[str, ...]
    files: int = 0
    bytes: int = 0

    @property
    def remedy(self) -> str | None:
        """Return what to do about the problems; None without any."""
        return None if self.ok else REMEDY


@own_settings()
def verify(checkpoint: Place | Checkpoint, *, progress: ProgressCallback = no_progress) -> Verification:
    """Read every file of an artifact and check sizes, checksums, dense arrays and the codes of each expert.

    A file that is missing, or that is not listed, is a problem too (README, LICENSE and hidden files apart).

    Args:
        checkpoint: the artifact, by path or URL, or opened.
        progress: called with the number of bytes whose checksum is checked, file by file.
    """
    if isinstance(checkpoint, ArtifactReader):
        store = checkpoint.store
    else:
        store = open_store(checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint)
    try:
        manifest, sums = Manifest.read(store), read_sums(store)
    except CheckpointError as error:
        return Verification(False, (str(error),))
    found = listed_files(store)
    problems = [*_missing(manifest, sums, found), *_extra(manifest, sums, found)]
    files, more = _check_files(store, manifest, sums, [name for name in found if name in sums], progress)
    problems += [*more, *_check_dense(store, manifest), *_check_experts(store)]
    return Verification(not problems, tuple(problems), len(files), sum(record.bytes for record in files))


def damaged_files(root: Place) -> tuple[str, ...]:
    """Return the files of a finished artifact that are missing or damaged, and how they differ.

    Files that do not belong there are left to `verify`, and so are the codes of each expert: if they do not
    decode, the program that wrote them is wrong, not the disk.
    """
    store = open_store(root)
    try:
        manifest, sums = Manifest.read(store), read_sums(store)
    except CheckpointError as error:
        return (str(error),)
    found = listed_files(store)
    missing = _missing(manifest, sums, found)
    _, problems = _check_files(store, manifest, sums, [name for name in found if name in sums], no_progress)
    return (*missing, *problems)


def _listed(manifest: Manifest) -> set[str]:
    return {group.path for group in manifest.groups} | manifest.files.keys() | {MANIFEST, REPORT}


def _missing(manifest: Manifest, sums: dict[str, str], found: list[str]) -> Iterator[str]:
    """Yield a problem for each file that is missing, on disk or in the list of checksums."""
    listed = _listed(manifest)
    expected = listed | {name for name in sums if name.startswith(f"{DENSE}/")}
    yield from (f"{name}: expected a file, found none" for name in sorted(expected - set(found)))
    yield from (
        f"{name}: expected in {SUMS}, the list of checksums, not found"
        for name in sorted(listed - sums.keys())
    )


def _extra(manifest: Manifest, sums: dict[str, str], found: list[str]) -> Iterator[str]:
    """Yield a problem for each file that should not be there."""
    expected = _listed(manifest) | {name for name in sums if name.startswith(f"{DENSE}/")}
    yield from (f"{name}: expected no such file, found one" for name in sorted(set(found) - expected))


def _check_files(
    store: Store, manifest: Manifest, sums: dict[str, str], names: list[str], progress: ProgressCallback
) -> tuple[list[FileRecord], list[str]]:
    """Hash the files, several at a time, and compare; return their records and the problems."""
    recorded = {group.path: group.record for group in manifest.groups} | dict(manifest.files)
    problems, records = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        expected = {name: recorded[name].bytes for name in names if name in recorded}
        sizes = list(pool.map(lambda name: store.size(name, expected.get(name)) or 0, names))
        tally = Tally(progress, sum(sizes))
        found = pool.map(functools.partial(_record, store), names)
        for name, size, record in zip(names, sizes, found, strict=True):
            tally.begin(name)
            tally.advance(size)
            if isinstance(record, CheckpointError):
                problems.append(str(record))
                continue
            records.append(record)
            if record.sha256 != sums[name]:
                problems.append(f"{name}: expected SHA-256 {sums[name]} (of {SUMS}), found {record.sha256}")
            elif recorded.get(name, record) != record:
                problems.append(f"{name}: expected {recorded[name]}, found {record}")
    return records, problems


def _record(store: Store, name: str) -> FileRecord | CheckpointError:
    try:
        found = store.find_record(name)
        return found or CheckpointError("is missing", path=store.path(name))
    except CheckpointError as error:
        return error


def _check_dense(store: Store, manifest: Manifest) -> Iterator[str]:
    """Yield a problem for each dense array whose content, read as a model reads it, is not the one listed."""
    for name, expected in manifest.dense.items():
        try:
            content = stored_record(store, name, expected)
        except CheckpointError as error:
            yield str(error)
            continue
        if content != expected:
            yield f"{DENSE}: {name}: expected SHA-256 {expected.sha256}, found {content.sha256}"


def _check_experts(store: Store) -> list[str]:
    """Return a problem for each group with an expert whose codes do not decode to its matrices' width.

    Several groups are decoded at a time, the problems in the order of the groups. Memory: a group as it is
    stored and the digits of one matrix (a byte each) per thread.
    """
    try:
        reader = ArtifactReader.open(store)
    except CheckpointError as error:
        return [str(error)]
    groups = [(layer, group) for layer in reader.layers.values() for group in layer.groups]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda each: _problem_of_group(each[0], each[1], reader.codebooks), groups)
        return [problem for problem in found if problem is not None]


def _problem_of_group(layer: ExpertLayer, group: GroupRecord, codebooks: Codebooks) -> str | None:
    """Return what is wrong with the first expert of a group that does not decode; None if they all do."""
    number = group.key.start
    try:
        for expert in layer.read(slice(group.key.start, group.key.stop)):
            for matrix in expert.values():
                unpack_digits(matrix, codebooks)
            number += 1
    except (CheckpointError, ValueError) as error:
        return f"{group.path}: expert {number}: {error}"
    return None
