"""Writes a table of every GPU kernel's registers, shared memory and instructions, compiled without a GPU.

    python -m tests.aot.report --json benchmarks/results/h100-compile.json \
        --markdown benchmarks/results/h100-compile.md

Takes one to two minutes and prints the table as Markdown: registers per thread, bytes of stack (spilled
registers), shared memory per block, and the instructions of the loop over codewords, read from the machine
code for an H100 (sm_90) and an A100 (sm_80). "per 1,000 weights": instructions of a warp for 1,000 weights of
one token (for ops without tokens: for 1,000 weights). Nothing is timed: instruction counts are not speeds.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from tests.aot import compiler

# Warp instructions of the loop and the weights that they process, also compiled for sm_90, for comparison.
KNOWN = {"upstream's CUDA matvec": (576, 694), "the first prototype of this project": (67, 694)}
HEADINGS = {
    "gpu": "GPU",
    "op": "op",
    "tokens": "tokens",
    "backend": "backend",
    "codebook": "codebook",
    "shape": "shape",
    "dtype": "dtype",
    "name": "kernel",
    "threads": "threads",
    "registers": "registers",
    "stack_bytes": "stack, bytes",
    "shared_bytes": "shared memory, bytes",
    "loop": "instructions of the loop",
    "per_1000_weights": "per 1,000 weights",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown, one line per kernel."""
    lines = [" | ".join(HEADINGS.values()), " | ".join(["---"] * len(HEADINGS))]
    for row in rows:
        for kernel in row["kernels"]:
            cells = row | kernel | {"loop": max(kernel["loops"], default="")}
            lines.append(
                " | ".join("" if (cell := cells.get(key)) is None else str(cell) for key in HEADINGS)
            )
    table = "\n".join(f"| {line} |" for line in lines)
    known = [f"{name}: {count} per 1,000 weights" for name, count in known_counts().items()]
    return f"{table}\n\nFor comparison, by the same count: {'; '.join(known)}.\n"


def known_counts() -> dict[str, int]:
    """Return the instructions per 1,000 weights of other kernels."""
    return {name: round(1000 * count / weights) for name, (count, weights) in KNOWN.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--markdown", help="file for the table")
    arguments = parser.parse_args()
    if reason := compiler.refusal():
        raise SystemExit(reason)
    found = json.loads(compiler.run_module("tests.aot.programs", "all"))
    table = markdown(found["rows"])
    print(table)
    if arguments.json:
        result = {
            "jax": found["jax"],
            "jax_triton": found["jax_triton"],
            "known": known_counts(),
            "rows": found["rows"],
        }
        pathlib.Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    if arguments.markdown:
        pathlib.Path(arguments.markdown).write_text(table)


if __name__ == "__main__":
    main()
