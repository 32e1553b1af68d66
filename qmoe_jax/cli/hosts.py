"""Joining of the processes (hosts) that share a command, by `jax.distributed`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import jax
import typer

Distributed = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT,COUNT,INDEX",
        help="Share the work with other processes of this command: auto under Slurm, Open MPI and Kubernetes "
        "(JobSet), which tell each its number; else the address of the first one, their number, and this "
        "one's from 0.",
        show_default="this process alone",
        rich_help_panel="Machine",
    ),
]


def join_hosts(distributed: str | None) -> None:
    """Join the processes that share this command; nothing for None. Comes before anything that computes.

    Args:
        distributed: the option.

    Raises:
        ValueError: the option cannot be read, or "auto" finds no cluster.
    """
    if distributed is None:
        return
    if distributed == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                "--distributed auto: expected a process that Slurm, Open MPI or Kubernetes has started, "
                f"found none ({error}); name the first process: --distributed HOST:PORT,COUNT,INDEX"
            ) from error
        return
    match = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", distributed)
    if match is None or not int(match[3]) < int(match[2]):
        raise ValueError(
            "--distributed: expected auto, or HOST:PORT,COUNT,INDEX with an index below the count, such as "
            f"10.0.0.1:8476,4,0; found {distributed!r}"
        )
    jax.distributed.initialize(match[1], int(match[2]), int(match[3]))


def of_host(path: Path) -> Path:
    """Return a path of this process's own: that of all hosts but the first has a suffix."""
    return path.with_name(f"{path.name}.host-{jax.process_index()}") if jax.process_index() else path
