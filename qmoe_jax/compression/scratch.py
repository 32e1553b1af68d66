"""The folder of hidden files that a run keeps until its artifact is finished: hidden states, staged experts.

It may be large (`plan.py`), and is best on a fast local disk; several hosts need one that all of them see.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from qmoe_jax.artifact.manifest import digest
from qmoe_jax.compression.producer import Producer
from qmoe_jax.distributed import Hosts
from qmoe_jax.files.durable import make_folder, write_durably
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.reading import read_json

FOLDER = ".scratch"
"""Name of the folder inside the artifact, where no other place is given."""


@dataclasses.dataclass(frozen=True)
class Scratch:
    """The scratch folder of one run.

    Attributes:
        root: the folder; its name holds what decides the hidden states, so that others' are never taken.
        hosts: the processes that share it.
    """

    root: Path
    hosts: Hosts

    @classmethod
    def of(cls, parent: Path, run: str, producer: Producer, hosts: Hosts) -> Scratch:
        """Return the folder of a run below `parent`; `run` is its digest, `producer` what computes."""
        name = digest({"run": run, "producer": dict(producer)})[:16]
        return cls(parent / f"qmoe-{name}", hosts)

    @property
    def staging(self) -> Path:
        """Folder for this host's staged experts, new and empty."""
        folder = self.root / f"staging-{self.hosts.index}"
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        return folder

    def clear(self) -> None:
        """Remove all that lies in the folder."""
        shutil.rmtree(self.root, ignore_errors=True)

    def agreed(self, name: str, decide: Callable[[], int]) -> int:
        """Return what the first host decides; every host calls this."""
        file = self.root / f"{name}.json"
        if self.hosts.first:
            decided = decide()
            if self.hosts.count > 1:
                write_durably(file, [json.dumps({name: decided}).encode()])
        self.hosts.barrier(name)
        if self.hosts.first:
            return decided
        if not file.exists():
            raise CheckpointError(
                "is not what the first host has",
                path=file,
                expected="one scratch folder for all hosts, and the same software and devices on each",
                remedy="name a folder on a file system that they share (--scratch)",
            )
        return int(read_json(file)[name])
