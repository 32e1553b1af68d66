"""The manifest, which lists content and checksums of an artifact, and the run that the artifact came from.

Both are canonical JSON (sorted keys, one layout, no times), so that equal runs give equal bytes and every
flipped bit is found: the file must be exactly what its content renders to, and its content must hash to its
own checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.kinds import Kind, kind_from_json, kind_to_json
from qmoe_jax.artifact.manifest_check import check_manifest, check_run
from qmoe_jax.artifact.selection import Selection
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.durable import FileRecord
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.foreign import foreign_error
from qmoe_jax.files.store import File, Place, open_store

FORMAT = "qmoe"
VERSION = 1
MANIFEST = "manifest.json"
RUN = "run.json"
REPORT = "report.json"


def canonical(content: Mapping[str, Any]) -> bytes:
    """Return the canonical JSON of an object.

    Raises:
        TypeError, ValueError: the object holds a value that JSON cannot express.
    """
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an object's canonical JSON."""
    return hashlib.sha256(canonical(content)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that decides the bytes of an artifact; two runs that are equal write the same.

    Attributes:
        config: the architecture.
        options: options of the compression, as JSON values.
        source: digests of the checkpoint and of the calibration data, as JSON values. Not their paths, which
            may change between a run and its resumption.
        codebooks: digest of each codebook, by name.
    """

    config: SwitchConfig
    options: Mapping[str, Any]
    source: Mapping[str, Any]
    codebooks: Mapping[str, str]

    @property
    def selection(self) -> Selection:
        """The layers and experts that the options select. Raises `ValueError` where they are none."""
        return Selection.of(self.config, self.options.get("layers"), self.options.get("experts"))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values (tuples become lists)."""
        return json.loads(canonical(dataclasses.asdict(self)))

    @classmethod
    def read(cls, root: Place) -> Run:
        """Read the run that began an artifact. Raises `CheckpointError` where its file is damaged."""
        file = File(open_store(root), RUN)
        path = file.path
        try:
            run = cls.from_json(read_canonical(file))
            check_run(run)
            return run
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path, "the fields of a run", repr(error)) from error

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Run:
        """Return the run that `to_json` wrote. Raises `KeyError` or `TypeError` where fields are missing."""
        config: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields["config"].items()
        }
        return cls(SwitchConfig(**config), fields["options"], fields["source"], fields["codebooks"])

    @property
    def digest(self) -> str:
        """Digest by which group files name their run."""
        return digest(self.to_json())

    def differences(self, other: Run) -> dict[str, tuple[Any, Any]]:
        """Return each setting in which two runs differ, by name: our value and the other's."""
        ours, theirs = _flatten(self.to_json()), _flatten(other.to_json())
        keys = sorted(ours.keys() | theirs.keys())
        return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


@dataclasses.dataclass(frozen=True)
class GroupRecord:
    """One expert group in the manifest: the experts, their file, its size and checksum."""

    key: GroupKey
    path: str
    record: FileRecord


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """One dense array: shape, dtype, and the SHA-256 of its elements (C order, little-endian)."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ArrayRecord:
        """Return the record that the manifest's fields describe."""
        return cls(tuple(fields["shape"]), fields["dtype"], fields["sha256"])


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of an artifact.

    Attributes:
        run: the run that it came from.
        kinds: packing of each compressed expert kernel, by its name in the parameter tree.
        groups: the expert groups, sorted.
        dense: the arrays of the Orbax checkpoint `dense/`, by name. Its files carry times, so they are not
            listed here but in the artifact's SHA256SUMS.
        files: the other files that are the same in every run, such as the codebooks.
        summary: figures of the result that are the same in every run, as JSON values.
    """

    run: Run
    kinds: Mapping[str, Kind]
    groups: tuple[GroupRecord, ...]
    dense: Mapping[str, ArrayRecord]
    files: Mapping[str, FileRecord]
    summary: Mapping[str, Any]

    def render(self) -> bytes:
        """Return the manifest's bytes."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "run": self.run.to_json(),
            "kinds": {name: kind_to_json(kind) for name, kind in self.kinds.items()},
            "experts": [_group_to_json(group) for group in self.groups],
            "dense": {name: dataclasses.asdict(array) for name, array in self.dense.items()},
            "files": {name: dataclasses.asdict(record) for name, record in self.files.items()},
            "summary": dict(self.summary),
        }
        return canonical({"checksum": digest(content), **content})

    @classmethod
    def read(cls, root: Place) -> Manifest:
        """Read and check the manifest of an artifact.

        Raises:
            CheckpointError: there is none (an unfinished artifact), it is damaged, or of a version unknown
                here.
        """
        store = open_store(root)
        path = store.path(MANIFEST)
        if not store.exists(MANIFEST) and store.exists(RUN):
            raise CheckpointError(
                "is unfinished",
                path=store.root,
                expected=MANIFEST,
                found="only the files of an interrupted compression",
                remedy="run the same compression again: it resumes",
            )
        content = read_canonical(File(store, MANIFEST))
        if content.get("format") != FORMAT:
            raise CheckpointError(
                "is not a qmoe artifact", path=path, expected=FORMAT, found=content.get("format")
            )
        if content.get("version") != VERSION:
            raise CheckpointError(
                "is of a version unknown here",
                path=path,
                expected=f"version {VERSION}",
                found=f"version {content.get('version')}",
                remedy="read it with a newer version of qmoe_jax",
            )
        expected = content.pop("checksum", None)
        if (found := digest(content)) != expected:
            raise _damaged(path, f"checksum {expected}", f"content with checksum {found}")
        try:
            manifest = cls._from_json(content, path)
            check_manifest(manifest)
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path, "the fields of a manifest", repr(error)) from error

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], path: object) -> Manifest:
        return cls(
            run=Run.from_json(content["run"]),
            kinds={name: kind_from_json(kind, path) for name, kind in content["kinds"].items()},
            groups=tuple(map(_group_from_json, content["experts"])),
            dense={name: ArrayRecord.from_json(array) for name, array in content["dense"].items()},
            files={name: FileRecord(**record) for name, record in content["files"].items()},
            summary=content["summary"],
        )


def read_canonical(file: File) -> dict[str, Any]:
    """Read a JSON object and check that the file is its canonical JSON.

    Raises:
        CheckpointError: the file is missing or not a JSON object, or differs by as much as a space.
    """
    path, data = file.path, file.store.read(file.name)
    try:
        content = json.loads(data)
        rendered = canonical(content)
    except (ValueError, RecursionError) as error:
        raise foreign_error(path, data) or _damaged(path, "a JSON object", str(error)) from error
    if not isinstance(content, dict) or rendered != data:
        raise _damaged(path, "canonical JSON as it was written", "other bytes")
    return content


def _group_to_json(group: GroupRecord) -> dict[str, Any]:
    fields = {**dataclasses.asdict(group.record), "path": group.path, "stack": group.key.stack}
    return {**fields, "layer": group.key.layer, "experts": [group.key.start, group.key.stop]}


def _group_from_json(fields: Mapping[str, Any]) -> GroupRecord:
    start, stop = fields["experts"]
    key = GroupKey(fields["stack"], fields["layer"], start, stop)
    return GroupRecord(key, fields["path"], FileRecord(fields["bytes"], fields["sha256"]))


def _damaged(path: object, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        "is damaged", path=path, expected=expected, found=found, remedy="copy the artifact again"
    )


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested objects as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
