"""Records of finished groups, one file per group, by which an interrupted run knows what it need not redo.

An artifact rounds levels to bfloat16, but calibration tokens run on through experts with float32 levels, as
upstream's do. So each finished group leaves two files in a hidden folder until the artifact is finished: its
float32 levels (8 bytes per row; 4 GB for c-2048), and last, when levels and group are on disk, its record,
which names the run, the checksums of both, and the group's figures. A group whose record, levels and file do
not agree in every byte is not finished.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import load, save

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.manifest import canonical, digest, read_canonical
from qmoe_jax.artifact.report import GroupReport
from qmoe_jax.files.durable import FileRecord, record_of_pieces
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.store import File, Place, Store, make_hold, open_store

FOLDER = ".exact-levels"

Levels = Mapping[str, np.ndarray]
"""Levels of each matrix of a group, float32 `[expert, out, group, 2]`."""


@dataclasses.dataclass(frozen=True)
class GroupRecord:
    """The record of a finished group.

    Attributes:
        run: digest of the run.
        group: size and checksum of the group's file in the artifact.
        levels: size and checksum of its levels.
        report: its figures.
    """

    run: str
    group: FileRecord
    levels: FileRecord
    report: GroupReport

    def render(self) -> bytes:
        """Return the bytes of the file, which hold their own checksum."""
        content = {
            "run": self.run,
            "group": dataclasses.asdict(self.group),
            "levels": dataclasses.asdict(self.levels),
            "report": self.report.to_json(),
        }
        return canonical({"checksum": digest(content), **content})

    @classmethod
    def read(cls, file: File) -> GroupRecord:
        """Read a record. Raises `CheckpointError` where it is missing, or differs in any byte."""
        content = read_canonical(file)
        try:
            if content.pop("checksum") != digest(content):
                raise ValueError("another checksum")
            return cls(
                content["run"],
                FileRecord(**content["group"]),
                FileRecord(**content["levels"]),
                GroupReport.from_json(content["report"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("is damaged", path=file.path, found=repr(error)) from error


class FinishedGroups:
    """The records and levels of an unfinished artifact's groups."""

    def __init__(self, artifact: Place, run: str):
        """Use the folder in an artifact; `run` is the digest of its run."""
        self.store: Store = open_store(artifact)
        self.run = run

    def read(self, key: GroupKey) -> GroupRecord | None:
        """Return the record of a group; None where there is none.

        Raises:
            CheckpointError: it is damaged, or another run's.
        """
        file = File(self.store, _record_name(key))
        if not self.store.exists(file.name):
            return None
        record = GroupRecord.read(file)
        if record.run != self.run:
            raise CheckpointError(
                "belongs to another run", path=file.path, expected=self.run, found=record.run
            )
        return record

    def read_levels(self, key: GroupKey, record: GroupRecord) -> Levels:
        """Return the levels of a group. Raises `CheckpointError` where they are not what its record names."""
        name = _levels_name(key)
        data = self.store.read(name)
        if (found := record_of_pieces([data])) != record.levels:
            raise CheckpointError(
                "is damaged", path=self.store.path(name), expected=record.levels, found=found
            )
        return load(data)

    def write_levels(self, key: GroupKey, levels: Levels) -> FileRecord:
        """Write the levels of a group, before its record."""
        content = save({name: np.ascontiguousarray(part) for name, part in levels.items()})
        return make_hold(self.store, _levels_name(key), [content])

    def write(self, key: GroupKey, group: FileRecord, levels: FileRecord, report: GroupReport) -> None:
        """Write the record of a group, once its levels and the group itself are on disk."""
        record = GroupRecord(self.run, group, levels, report)
        make_hold(self.store, _record_name(key), [record.render()])


def _levels_name(key: GroupKey) -> str:
    return f"{FOLDER}/{key.path}"


def _record_name(key: GroupKey) -> str:
    return f"{FOLDER}/{key.path.removesuffix('.safetensors')}.json"


def remove_records(artifact: Place) -> None:
    """Remove records and levels, once the artifact is finished."""
    open_store(artifact).delete_folder(FOLDER)
