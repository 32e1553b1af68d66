"""The process that reads inputs: python -m tests.fuzz.worker TARGET FOLDER SECONDS SEED.

It writes each input to FOLDER/current before it reads it, and a line to FOLDER/events for each fault, so
that the process above knows what ended it.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.target import Sample, Target, Verdict, mutate

MEMORY = 2**30
"""Bytes that an input may take beyond what its sample does; files here have some kilobytes."""
POOL = 500
"""Inputs that are changed further."""


def fuzz(target: Target, folder: Path, seconds: float, seed: int, corpus: list[bytes]) -> None:
    """Try inputs until the time is over."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory, (folder / "events").open("a") as events:

        def note(**fields: object) -> None:
            events.write(json.dumps(fields) + "\n")
            events.flush()

        sample = Sample(target, Path(directory))
        sample.warm()
        if (verdict := sample.judge(sample.original)).fault:
            note(fault=f"the sample itself: {verdict.told}", place="sample", data=sample.original.hex())
            return
        _limit_memory()
        pool, places, tried = [sample.original, *corpus], {"loads"}, 0
        (folder / "ready").touch()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            data = mutate(target, rng.choice(pool) if rng.random() < 0.6 else sample.original, rng)
            (folder / "current").write_bytes(data)
            verdict, tried = sample.judge(data), tried + 1
            if verdict.place not in places:
                places.add(verdict.place)
                if verdict.fault:
                    began = time.monotonic()
                    smaller = shrink(sample, data, verdict, seconds=3)
                    deadline += time.monotonic() - began
                    note(fault=sample.judge(smaller).told, place=verdict.place, data=smaller.hex())
                else:
                    pool = [*pool, data][-POOL:]
            if tried % 20 == 0:
                note(tried=20)
        note(tried=tried % 20, places=len(places))
    (folder / "done").touch()


def shrink(sample: Sample, data: bytes, verdict: Verdict, *, seconds: float) -> bytes:
    """Return a smaller or less changed input with the same fault, as far as the time allows."""
    deadline, size = time.monotonic() + seconds, max(1, len(data) // 2)
    while size:
        at = 0
        while at < len(data) and time.monotonic() < deadline:
            shorter = data[:at] + data[at + size :]
            if sample.judge(shorter).place == verdict.place:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def _limit_memory() -> None:
    status = Path("/proc/self/status")
    if status.exists():
        used = next(
            int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmSize")
        )
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + MEMORY, hard))


if __name__ == "__main__":
    from tests.fuzz.targets import CORPUS, TARGETS

    name, folder, seconds, seed = sys.argv[1:]
    corpus = [file.read_bytes() for file in sorted((CORPUS / name).glob("*"))]
    fuzz(TARGETS[name], Path(folder), float(seconds), int(seed), corpus)
