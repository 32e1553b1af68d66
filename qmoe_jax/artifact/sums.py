"""The file `SHA256SUMS`: the checksum of every file of an artifact, in the format of `sha256sum -c`.

It covers what the manifest cannot list because it differs from run to run: the files of `dense/`, into which
Orbax writes times, and the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.names import is_stray
from qmoe_jax.files.reading import read_whole

SUMS = "SHA256SUMS"

FOREIGN = frozenset({"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"})
"""Files that people and hubs put beside an artifact; these, and strays at any depth, do not belong to it."""


def listed_files(root: Path) -> list[str]:
    """Return every file of an artifact except `SHA256SUMS`, as sorted relative paths."""
    files = (file.relative_to(root) for file in root.rglob("*") if not file.is_dir())
    ours = (file for file in files if not any(map(is_stray, file.parts)) and file.as_posix() not in FOREIGN)
    return sorted(file.as_posix() for file in ours if file != Path(SUMS))


def render_sums(sums: Mapping[str, str]) -> bytes:
    """Return the bytes of the file, from checksums by relative path."""
    return "".join(f"{sums[path]}  {path}\n" for path in sorted(sums)).encode()


def read_sums(root: Path) -> dict[str, str]:
    """Read the checksums by relative path.

    Raises:
        CheckpointError: the file is missing, or differs in any way from what `render_sums` writes.
    """
    path = root / SUMS
    data = read_whole(path)
    lines = [line.partition("  ") for line in data.decode(errors="replace").splitlines()]
    sums = {name: sha256 for sha256, _, name in lines}
    if render_sums(sums) != data:
        raise CheckpointError("is damaged", path=path, expected="lines of a checksum and a path, sorted")
    return sums
