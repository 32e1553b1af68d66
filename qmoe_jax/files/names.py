"""Names of files: those nearly as they were looked for, and those that belong to nobody."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp", ".download")
"""Endings that downloads give a file until it is complete."""

_STRAY = (
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "system volume information",
    "__macosx", "lost+found", "@eadir", "#recycle",
)  # fmt: skip


LONGEST = 255
"""Bytes of a name that every common file system takes."""


def is_file_name(name: str) -> bool:
    """Return whether a text can be the name of a file in a directory: no path, no NUL, not too long."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    plain = Path(name).name == name and name not in (".", "..") and "\0" not in name
    return bool(name) and plain and len(encoded) <= LONGEST


def is_inside(path: str) -> bool:
    """Return whether a text can be the relative path of a file, with "/" between names, that stays inside."""
    return all(map(is_file_name, path.split("/")))


def similar(directory: Path, name: str) -> str | None:
    """Return a file in `directory` that has the name in other letters or incomplete, or is a link to nothing.

    None without such a file.
    """
    wanted = {name.lower()} | {name.lower() + ending for ending in PARTIAL}
    return next((entry.name for entry in sorted(directory.iterdir()) if entry.name.lower() in wanted), None)


def is_stray(name: str) -> bool:
    """Return whether systems, file managers or editors leave entries of this name in any directory.

    These are hidden entries (`.DS_Store`, `._x`, `.nfs0001`, `.snapshot`, `.ipynb_checkpoints`), known names
    of other systems, and backups of editors (`x~`, `#x#`, `x.swp`, `x.bak`, `x.orig`).
    """
    lower = name.lower()
    backup = lower.endswith(("~", ".swp", ".swo", ".bak", ".orig")) or (lower[0], lower[-1]) == ("#", "#")
    return lower.startswith(".") or lower in _STRAY or backup
