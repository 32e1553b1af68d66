"""The data files of an OCDBT database, which its own manifest lists: which are missing, and which cut short.

Memory: the nodes of the database's tree, one at a time: the keys, and values of at most 1 KiB.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import tensorstore as ts

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location, first_line

# btreenode:<base>:<file>:<offset>:<length>, and so on; base and file are percent-encoded.
_PLACE = re.compile(r"(btreenode|versionnode|value):([^:]*):([^:]+):(\d+):(\d+)")


def data_files(base: Location) -> dict[str, int]:
    """Return the files that the newest version of a database needs, and the least bytes of each.

    Raises:
        CheckpointError: the manifest or a node of the tree is missing or damaged.
    """
    files: dict[str, int] = {}
    try:
        versions = ts.ocdbt.dump(base.store).result()["versions"]
        places = list(_places(versions[-1:]))
        while places:
            place = places.pop()
            file = urllib.parse.unquote(place[2] + place[3])
            files[file] = max(files.get(file, 0), int(place[4]) + int(place[5]))
            if place[1] != "value":
                places += _places(ts.ocdbt.dump(base.store, place[0]).result())
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            "the OCDBT database is damaged",
            path=base.path,
            found=first_line(error),
            remedy="copy the checkpoint again",
        ) from error
    return files


def _places(node: Any) -> Iterator[re.Match[str]]:
    """Yield every place that a node mentions, at any depth."""
    if isinstance(node, str):
        if match := _PLACE.fullmatch(node):
            yield match
    elif isinstance(node, (dict, list)):
        for member in node.values() if isinstance(node, dict) else node:
            yield from _places(member)
