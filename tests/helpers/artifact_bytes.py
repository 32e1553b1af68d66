"""The bytes that every run of one compression must give."""

import hashlib
import pathlib


def stored_bytes(path: pathlib.Path) -> dict[str, str]:
    """Return the checksums of an artifact's manifest and experts, by file."""
    files = [path / "manifest.json", *sorted(p for p in (path / "experts").rglob("*") if p.is_file())]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
