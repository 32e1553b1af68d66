"""The plan of a compression: bytes, memory, flops and time, before anything is read or written."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.planning.costs import (
    SINGLE_EXPERTS,
    ExpertStorage,
    PassCost,
    TokenCounts,
    pass_costs,
)
from qmoe_jax.compression.planning.machine import measure_rates
from qmoe_jax.compression.planning.rates import Rates
from qmoe_jax.compression.planning.resources import Limits, Resources, Terms, bits_per_weight, nearest_folder
from qmoe_jax.compression.scratch import FOLDER as SCRATCH
from qmoe_jax.config import SwitchConfig
from qmoe_jax.data import Examples
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import local_path


@dataclasses.dataclass(frozen=True)
class PlannedPass:
    """One pass over all tokens or experts of a step.

    Attributes:
        name: such as "encoder layer 3, attention".
        flops: by kind of work.
        read: bytes to read from disks.
        written: bytes to write.
        stages: seconds of reading, computing, coding and storing.
        seconds: time of the pass: of the slowest stage, or of all where they share the processor.
    """

    name: str
    flops: Mapping[str, float]
    read: float
    written: float
    stages: Mapping[str, float]
    seconds: float

    @classmethod
    def of(cls, cost: PassCost, rates: Rates, devices: int, hosts: int) -> PlannedPass:
        """Return a pass at a machine's rates."""
        return cls(
            f"{cost.step.name}, {cost.name}",
            {kind.name.lower(): sum(amount.flops.values()) for kind, amount in cost.work.items()},
            cost.read,
            cost.written,
            cost.stages(rates, devices, hosts),
            cost.seconds(rates, devices, hosts),
        )


@dataclasses.dataclass(frozen=True)
class CompressionPlan:
    """The bytes that a compression will read, write, hold in memory and take, in bytes and seconds.

    Attributes:
        checkpoint: path of the checkpoint.
        stored_bytes: its size on disk; None where that is unknown.
        decoded_bytes: its size once decoded.
        resources: memory and disk, term by term.
        limits: the memory and disk that there are.
        rates: speeds that times are computed with.
        hosts: number of hosts, each with `resources.devices` devices.
        passes: the passes in their order.
        problems: what does not fit, as errors that say what to change.
    """

    checkpoint: str
    stored_bytes: int | None
    decoded_bytes: int
    resources: Resources
    limits: Limits
    rates: Rates
    hosts: int
    passes: tuple[PlannedPass, ...]
    problems: tuple[CheckpointError, ...]

    @property
    def seconds(self) -> float:
        """Time of all passes."""
        return sum(each.seconds for each in self.passes)

    @property
    def flops(self) -> dict[str, float]:
        """Flops of all passes, by kind of work."""
        total: dict[str, float] = {}
        for each in self.passes:
            for kind, flops in each.flops.items():
                total[kind] = total.get(kind, 0.0) + flops
        return total

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage over all passes, as if it were alone."""
        return {name: sum(each.stages[name] for each in self.passes) for name in self.passes[0].stages}

    @property
    def bits_per_weight(self) -> float:
        """Expected bits of a weight's code."""
        return bits_per_weight(self.resources.config)

    def require_fit(self) -> None:
        """Raise the first of `problems`, a `CheckpointError` that says what to change, if there are any."""
        for problem in self.problems:
            raise problem

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON's types; bytes and seconds."""
        resources = self.resources
        parts: dict[str, Terms] = {
            "memory": resources.memory,
            "device": resources.device,
            "scratch": resources.scratch,
            "artifact": resources.artifact,
        }
        return {
            "checkpoint": self.checkpoint,
            "stored_bytes": self.stored_bytes,
            "decoded_bytes": self.decoded_bytes,
            "tokens": dataclasses.asdict(resources.tokens),
            "devices": resources.devices,
            "hosts": self.hosts,
            "bits_per_weight": self.bits_per_weight,
            **{f"{name}_bytes": {**terms, "total": sum(terms.values())} for name, terms in parts.items()},
            "limits": dataclasses.asdict(self.limits),
            "rates": dataclasses.asdict(self.rates),
            "flops": self.flops,
            "stages": self.stages,
            "passes": [dataclasses.asdict(each) for each in self.passes],
            "seconds": self.seconds,
            "problems": [str(problem) for problem in self.problems],
        }


def plan(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    tokens: TokenCounts | Examples,
    config: CompressionConfig = CompressionConfig(),  # noqa: B008 (frozen)
    *,
    output: str | os.PathLike[str] | None = None,
    scratch: str | os.PathLike[str] | None = None,
    devices: int | None = None,
    hosts: int = 1,
    rates: Rates | None = None,
) -> CompressionPlan:
    """Return the plan of a compression, without reading parameters and without writing.

    Args:
        checkpoint: a checkpoint of any dense format, by path or URL, or opened.
        tokens: the calibration samples, or their number and tokens.
        config: the options.
        output: the artifact's directory, which may be missing. None: the disk is not checked.
        scratch: the folder for scratch files; by default inside the artifact.
        devices: devices of each host; by default those of this process.
        hosts: number of hosts.
        rates: speeds of another machine, whose memory and disk are then not checked; by default this one is
            measured, which takes seconds.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        ValueError: the options do not fit the model.
    """
    reader = open_checkpoint(checkpoint)
    counts = tokens if isinstance(tokens, TokenCounts) else TokenCounts.of(tokens)
    storage = ExpertStorage.of(reader)
    place = None if output is None else local_path(output)
    folder = Path(scratch) if scratch is not None else place and place / SCRATCH
    here = rates is None
    if rates is None:
        rates = measure_rates(reader.config, nearest_folder(folder or Path()))
    count = devices or (len(jax.local_devices()) if here else 1)
    resources = Resources(reader.config, config, counts, storage, count, rates.shares_cores)
    limits = Limits.here(place, folder) if here else Limits()
    return CompressionPlan(
        str(reader.path),
        _stored_bytes(reader),
        sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in reader.tensors.values()),
        resources,
        limits,
        rates,
        hosts,
        planned_passes(reader.config, config, counts, rates, storage=storage, devices=count, hosts=hosts),
        tuple(resources.problems(limits, output=output, scratch=folder)),
    )


def planned_passes(
    model: SwitchConfig,
    config: CompressionConfig,
    tokens: TokenCounts,
    rates: Rates,
    *,
    storage: ExpertStorage = SINGLE_EXPERTS,
    devices: int = 1,
    hosts: int = 1,
) -> tuple[PlannedPass, ...]:
    """Return the passes of a compression at a machine's rates: of a model of any shape, without a checkpoint.

    Args:
        model: the architecture.
        config: the options.
        tokens: size of the calibration text.
        rates: speeds of the machine.
        storage: of the experts.
        devices: devices of each host.
        hosts: number of hosts.
    """
    costs = pass_costs(model, config, tokens, storage)
    return tuple(PlannedPass.of(cost, rates, devices, hosts) for cost in costs)


def _stored_bytes(reader: Checkpoint) -> int | None:
    sizes = [shard.nbytes for shard in reader.shards()]
    return sum(size for size in sizes if size is not None) if sizes and None not in sizes else None
