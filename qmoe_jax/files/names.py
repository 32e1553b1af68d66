"""Names of files that are nearly those that were looked for."""

from __future__ import annotations

from pathlib import Path

PARTIAL = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp", ".download")
"""Endings that downloads give a file until it is complete."""


def similar(directory: Path, name: str) -> str | None:
    """Return a file in `directory` that has the name in other letters or incomplete, or is a link to nothing.

    None without such a file.
    """
    wanted = {name.lower()} | {name.lower() + ending for ending in PARTIAL}
    return next((entry.name for entry in sorted(directory.iterdir()) if entry.name.lower() in wanted), None)
