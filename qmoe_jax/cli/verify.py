"""qmoe verify: is every byte of an artifact what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import progress
from qmoe_jax.cli.failures import OK, PROBLEMS


def verify(
    path: Annotated[
        Path, typer.Argument(help="An artifact, as `qmoe compress` writes it.", show_default=False)
    ],
) -> Answer:
    """Check every byte of a compressed model.

    Each file is read and compared with its checksum, each array with the
    manifest, and each expert's codes are decoded. Exits with 0 if all is well
    and with 3 if not: then each problem is named, with expected and found.

    Examples:
      $ qmoe verify mini-ternary
      $ qmoe verify mini-ternary --json | jq -r '.problems[]'
      $ qmoe verify mini-ternary && rsync -a mini-ternary server:models/
    """
    import qmoe_jax as qj
    from qmoe_jax.artifact.open import is_artifact

    if not is_artifact(path):
        found = qj.open_checkpoint(path, check=False).format  # names what is missing where there is nothing
        raise qj.CheckpointError(
            "is no artifact", path=path, found=f"a {found} checkpoint", remedy="look at it by qmoe inspect"
        )
    with progress("checking", "bytes") as advance:
        result = qj.verify(path, progress=lambda done, total, label: advance(done, total))
    fields = {
        "path": path, "ok": result.ok, "files": result.files, "bytes": result.bytes, "problems": result.problems,
    }  # fmt: skip
    counted = f"{result.files:,} files, {result.bytes:,} bytes"
    if result.ok:
        return Answer(fields, (Text(f"{path}: all is well: {counted}", style="green"),), OK)
    problems = "1 problem" if len(result.problems) == 1 else f"{len(result.problems):,} problems"
    verdict = Text(f"{path}: {problems} in {counted}", style="red")
    return Answer(fields, (verdict, *(f"  {problem}" for problem in result.problems)), PROBLEMS)
