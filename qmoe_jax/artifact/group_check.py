"""Checks of the group files that an interrupted run finds: its own and intact, damaged, or of another."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from qmoe_jax.artifact.groups import GroupFile, GroupKey, render_group
from qmoe_jax.files.durable import FileRecord, record_of_pieces
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.store import Store

_THREADS = 8
"""Files that are read at a time: enough for a disk, and an object store answers them together."""


def check_group(store: Store, key: GroupKey, run: str) -> FileRecord:
    """Check that a group's file is the run's, and exactly what its content would be written as.

    Args:
        store: the artifact.
        key: the group.
        run: digest of the run.

    Raises:
        CheckpointError: it is not.
    """
    path, group = store.path(key.path), GroupFile.open(store, key)
    if group.run != run:
        raise CheckpointError(
            "belongs to another run",
            path=path,
            expected=f"run {run}",
            found=f"run {group.run}",
            remedy="remove the file, or choose another output directory",
        )
    expected = _as_written(group)
    if (found := store.find_record(key.path)) != expected:
        raise CheckpointError(
            "is damaged",
            path=path,
            expected=expected,
            found=found,
            remedy="remove it: the run writes it again",
        )
    return expected


def check_groups(store: Store, keys: Iterable[GroupKey], run: str) -> dict[GroupKey, FileRecord]:
    """Return the records of those groups whose files `check_group` accepts, several checked at a time.

    Memory: two copies of `_THREADS` groups.
    """

    def check(key: GroupKey) -> FileRecord | None:
        try:
            return check_group(store, key, run)
        except CheckpointError:
            return None

    keys = list(keys)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(keys, pool.map(check, keys), strict=True)
        return {key: record for key, record in found if record is not None}


def require_damaged(store: Store, key: GroupKey, record: FileRecord) -> None:
    """Check that a group's file, which is not the one of this `record`, is a damaged one.

    Raises:
        CheckpointError: it is whole: another process or machine has written it.
    """
    try:
        group = GroupFile.open(store, key)
        whole = _as_written(group)
    except (CheckpointError, ValueError):
        return
    if store.find_record(key.path) == whole:
        raise CheckpointError(
            "is there already, with other bytes",
            path=store.path(key.path),
            expected=record,
            found=f"{whole}, of run {group.run}",
            remedy="another process or machine has written it: stop that process, or choose another "
            "location; or remove the object, then run the same command again",
        )


def _as_written(group: GroupFile) -> FileRecord:
    """Return the record of the file that a group's content is written as."""
    content = group.read(group.key.start, group.key.stop)
    return record_of_pieces(render_group(group.key, content, group.run))
