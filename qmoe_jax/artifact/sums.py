"""The file `SHA256SUMS`: the checksum of every file of an artifact, in the format of `sha256sum -c`.

It covers what the manifest cannot list because it differs from run to run: the files of `dense/`, whose names
are random, and the report.
"""

from __future__ import annotations

from collections.abc import Mapping

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.names import is_stray
from qmoe_jax.files.store import Place, Store, open_store

SUMS = "SHA256SUMS"

FOREIGN = frozenset({"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"})
"""Files that people and hubs put beside an artifact; these, and strays at any depth, do not belong to it."""


def listed_files(store: Store) -> list[str]:
    """Return every file of an artifact except `SHA256SUMS`, as sorted relative paths.

    Where files cannot be listed (http), those that `SHA256SUMS` lists.
    """
    names = store.names() if store.can_list else sorted(read_sums(store))
    ours = (name for name in names if not any(map(is_stray, name.split("/"))))
    return [name for name in ours if name not in FOREIGN and name != SUMS]


def render_sums(sums: Mapping[str, str]) -> bytes:
    """Return the bytes of the file, from checksums by relative path."""
    return "".join(f"{sums[path]}  {path}\n" for path in sorted(sums)).encode()


def read_sums(artifact: Place) -> dict[str, str]:
    """Read the checksums by relative path.

    Raises:
        CheckpointError: the file is missing, or differs in any way from what `render_sums` writes.
    """
    store = open_store(artifact)
    path, data = store.path(SUMS), store.read(SUMS)
    lines = [line.partition("  ") for line in data.decode(errors="replace").splitlines()]
    sums = {name: sha256 for sha256, _, name in lines}
    if render_sums(sums) != data:
        raise CheckpointError("is damaged", path=path, expected="lines of a checksum and a path, sorted")
    return sums
