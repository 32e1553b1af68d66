"""The command `python -m tests.fuzz`."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from tests.fuzz.campaign import fuzz
from tests.fuzz.target import Sample
from tests.fuzz.targets import TARGETS

DESCRIPTION = """\
Change the files that our own writers write, at random, and read them. An input must load, or be refused by an
error of the project that names the file: no other exception, no crash, no hang, no memory that a lying header
asks for, no pickle executed.

Faults are saved, made small, below --output. Try one again with --replay; once its fault is fixed, file it
under tests/fuzz/corpus/TARGET with a line in tests/fuzz/corpus/expected.json: `make test` replays it."""
EXAMPLES = """\
examples:
  python -m tests.fuzz                                    every target, 15 seconds each
  python -m tests.fuzz torch-archive --seconds 600 --seed 7
  python -m tests.fuzz torch-archive --replay runs/fuzz/torch-archive/1f2e3d4c
"""


def main() -> int:
    """Run the command line; the exit code is 1 where there are faults."""
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all ({', '.join(TARGETS)})")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float(os.environ.get("FUZZ_SECONDS", "15")),
        help="per target (FUZZ_SECONDS; default 15)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=int(os.environ.get("FUZZ_SEED", "0")),
        help="of the changes (FUZZ_SEED; default 0)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/fuzz"), help="where faults are saved (runs/fuzz)"
    )
    parser.add_argument(
        "--replay", type=Path, nargs="+", metavar="FILE", help="read these inputs, print what happens"
    )
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"unknown target {unknown[0]}; choose from {', '.join(TARGETS)}")
    if options.replay:
        if len(options.targets) != 1:
            parser.error("--replay needs exactly one TARGET")
        return _replay(options.targets[0], options.replay)
    faults = 0
    for name in options.targets or TARGETS:
        result = fuzz(name, options.seconds, options.seed)
        faults += len(result.faults)
        print(
            f"{name:24} {result.tried:8,} inputs {result.places:5} outcomes {len(result.faults):4} faults",
            flush=True,
        )
        for fault in result.faults.values():
            file = options.output / name / hashlib.sha256(fault.data).hexdigest()[:8]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(fault.data)
            print(f"  {file} ({len(fault.data)} bytes): {fault.place}\n    {fault.told[:600]}", flush=True)
    return 1 if faults else 0


def _replay(name: str, files: list[Path]) -> int:
    faults = 0
    with tempfile.TemporaryDirectory() as directory:
        sample = Sample(TARGETS[name], Path(directory))
        sample.warm()
        for file in files:
            verdict = sample.judge(file.read_bytes())
            faults += verdict.fault
            print(f"{file}: {'FAULT ' if verdict.fault else ''}{verdict.told}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
