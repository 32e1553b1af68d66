"""Artifacts: manifest, groups, codebooks, dense arrays, report and checksums."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from qmoe_jax.artifact import open_checkpoint, verify
from qmoe_jax.artifact.manifest import MANIFEST, RUN, Manifest, canonical, digest
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.artifact.report import CompressionReport
from qmoe_jax.artifact.sums import SUMS, read_sums
from qmoe_jax.files.durable import FileRecord, record_of
from qmoe_jax.files.errors import CheckpointError
from tests.fuzz import mutation
from tests.fuzz.checkpoint_targets import change_ocdbt, check_checkpoint
from tests.fuzz.target import Target
from tests.helpers.artifact_samples import CONFIG, KINDS, write_artifact, writer

ARTIFACT = "artifact"


def load(directory: Path) -> None:
    """Read an artifact in every way: its parameters, its packed matrices, its report."""
    reader = open_checkpoint(directory / ARTIFACT)
    assert isinstance(reader, ArtifactReader)
    check_checkpoint(reader)
    for name in reader.names():
        if (kind := reader.kind(name)) is not None and kind.name == "ternary" and kind.group_size is None:
            reader.packed(name).validate()


def load_verified(directory: Path) -> None:
    """Verify an artifact, which names every problem instead of raising."""
    found = verify(directory / ARTIFACT)
    if not found.ok:
        raise CheckpointError("; ".join(found.problems), path=directory / ARTIFACT)


def load_report(directory: Path) -> None:
    """Read the report and what is computed from it."""
    report = CompressionReport.read(directory / ARTIFACT)
    assert report.layers is not None and report.fallbacks is not None
    assert report.under_calibrated() is not None and report.sparsity >= 0
    assert report.entropy is None or report.entropy >= 0


def load_run(directory: Path) -> None:
    """Resume an unfinished artifact."""
    with writer(directory / ARTIFACT):
        pass


def _artifact(file: str, kind: str = "ternary") -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        write_artifact(directory / ARTIFACT, KINDS[kind])
        return min((directory / ARTIFACT).rglob(file))

    return write


def _reported(directory: Path) -> Path:
    write_artifact(directory / ARTIFACT)
    file = directory / ARTIFACT / "report.json"
    matrix = {
        "weight_error": [0.5] * 5,
        "output_error": [0.25, None] + [0.5] * 3,
        "sparsity": [0.8] * 5,
        "bytes": [100] * 5,
        "fallback": [False, True] + [False] * 3,
    }
    group = {
        "stack": "encoder",
        "layer": 1,
        "start": 0,
        "routed_tokens": [9, 0, 5, 4, 3],
        "calibration_tokens": [9, 0, 5, 4, 3],
        "matrices": {"wi": matrix, "wo": matrix},
        "seconds": 1.5,
    }
    file.write_text(json.dumps({"groups": [group], "seconds": 2.0, "device": "cpu"}))
    return file


def _unfinished(directory: Path) -> Path:
    with writer(directory / ARTIFACT):
        pass
    return directory / ARTIFACT / RUN


def install_sealed(file: Path, data: bytes) -> None:
    """Put a manifest in its place in canonical form and with its checksum, where it is JSON."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        content = json.loads(data)
        content.pop("checksum", None)
        data = canonical({"checksum": digest(content), **content})
    file.write_bytes(data)


def install_canonical(file: Path, data: bytes) -> None:
    """Put a JSON file in its place in canonical form."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        data = canonical(json.loads(data))
    file.write_bytes(data)


def install_listed(file: Path, data: bytes) -> None:
    """Put a file in its place, and its size and checksum into the manifest: only its content is wrong."""
    root = next(parent for parent in file.parents if parent.name == ARTIFACT)
    file.write_bytes(data)
    name, record = file.relative_to(root).as_posix(), FileRecord(len(data), hashlib.sha256(data).hexdigest())
    backup = root.parent / MANIFEST
    if not backup.exists():
        backup.write_bytes((root / MANIFEST).read_bytes())
    (root / MANIFEST).write_bytes(backup.read_bytes())
    manifest = Manifest.read(root)
    groups = tuple(dataclasses.replace(g, record=record) if g.path == name else g for g in manifest.groups)
    files = {key: record if key == name else value for key, value in manifest.files.items()}
    (root / MANIFEST).write_bytes(dataclasses.replace(manifest, groups=groups, files=files).render())


def install_summed(file: Path, data: bytes) -> None:
    """As `install_listed`, with the checksums of SHA256SUMS too."""
    install_listed(file, data)
    root = next(parent for parent in file.parents if parent.name == ARTIFACT)
    sums = {name: record_of(root / name).sha256 for name in read_sums(root)}
    (root / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


_JSON, _TENSORS = (mutation.change_json,), (mutation.change_safetensors, mutation.change_bytes)
_GROUP = "encoder.layers_01/experts-00000-00001.safetensors"
TARGETS = (
    Target("manifest", _artifact(MANIFEST), load, (mutation.change_bytes,)),
    Target("manifest-sealed", _artifact(MANIFEST), load, _JSON, install=install_sealed),
    Target("run", _unfinished, load_run, _JSON, install=install_canonical),
    Target("group", _artifact(_GROUP), load, _TENSORS, install=install_listed),
    Target("group-uniform", _artifact(_GROUP, "3 bits, groups"), load, _TENSORS, install=install_listed),
    Target("group-verify", _artifact(_GROUP), load_verified, _TENSORS, install=install_summed),
    Target("codebooks", _artifact("codebooks.safetensors"), load, _TENSORS, install=install_listed),
    Target("report", _reported, load_report, _JSON),
    Target("sums", _artifact(SUMS), load_verified),
    Target("dense-manifest", _artifact("dense/manifest.ocdbt"), load, (change_ocdbt,)),
    Target("dense-data", _artifact("dense/d/*"), load, (change_ocdbt, mutation.change_bytes)),
)
assert CONFIG.num_experts == 5  # `_reported` has as many
