"""qmoe verify: checks every byte of an artifact."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

import qmoe_jax as qj
from qmoe_jax.artifact.open import artifact_root
from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.failures import OK, PROBLEMS


def verify(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="An artifact, as `qmoe compress` writes it; its directory or URL.",
            show_default=False,
        ),
    ],
) -> Answer:
    """Check every byte of a compressed model.

    Every file is read and compared with its checksum, every array with the
    manifest, and the codes of every expert are decoded. Exits with 0 if the
    artifact is intact, and with 3 if not: then each problem is printed, with
    what was expected and found.

    Examples:
        $ qmoe verify mini-ternary
        $ qmoe verify mini-ternary --json | jq -r '.problems[]'
        $ qmoe verify mini-ternary && rsync -a mini-ternary server:models/
    """
    if (root := artifact_root(path)) is None:
        found = qj.open_checkpoint(path, check=False).format  # raises where there is nothing
        raise qj.CheckpointError(
            "is not an artifact", path=path, found=f"a {found} checkpoint", remedy="use qmoe inspect"
        )
    with qj.ProgressBar("checking", "bytes") as progress:
        result = qj.verify(root, progress=progress)
    fields = {
        "path": path, "ok": result.ok, "files": result.files, "bytes": result.bytes,
        "problems": result.problems, "remedy": result.remedy,
    }  # fmt: skip
    checked = f"{result.files:,} files, {result.bytes:,} bytes"
    if result.ok:
        return Answer(fields, (Text(f"{path}: OK: {checked}", style="green"),), OK)
    problems = "1 problem" if len(result.problems) == 1 else f"{len(result.problems):,} problems"
    verdict = Text(f"{path}: {problems} in {checked}", style="red")
    lines = [f"  {problem}" for problem in result.problems]
    return Answer(fields, (verdict, *lines, f"  remedy: {result.remedy}"), PROBLEMS)
