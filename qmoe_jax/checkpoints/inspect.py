"""What a checkpoint holds and what it would take to hold it: plain data for a table or JSON."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from qmoe_jax.checkpoints.reader import Reader
from qmoe_jax.config import PRESETS, SwitchConfig
from qmoe_jax.files.tensor import Shard
from qmoe_jax.parameters import STACKS, is_expert

_BFLOAT16_BYTES = 2
# Bits that a row (one output of one expert) has beside its digits: two bfloat16 levels and, where there are
# codewords, an int32 offset.
_CODED_ROW_BITS, _PLAIN_ROW_BITS = 64, 32
# Bits a weight of the digits. Coded ternary ones were measured on 20 million digits of which 88.5 % are zero,
# as in the published models; another share of zeros makes another size.
FORMS: Mapping[str, tuple[float, int]] = {
    "ternary, 8-bit codewords": (0.701, _CODED_ROW_BITS),
    "ternary, upstream's dictionary": (0.735, _CODED_ROW_BITS),
    "2 bits": (2, _PLAIN_ROW_BITS),
    "3 bits": (3, _PLAIN_ROW_BITS),
    "4 bits": (4, _PLAIN_ROW_BITS),
}
"""Compressed forms of the experts -> (bits a weight, bits a row)."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: its experts (0: a dense one) and its parameters."""

    stack: str
    index: int
    experts: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A checkpoint in numbers.

    Attributes:
      preset: the published model of this architecture, if it is one.
      dtypes: stored dtype -> parameters in it.
      files, bytes_on_disk: of the parameters; None where the format or the place does not tell.
      damaged: files that are missing or cut short, with what is wrong.
      memory: form of the experts -> bytes of the model with all else in bfloat16 (an estimate if compressed).
      notes: what the reader had to decide.
    """

    path: str
    format: str
    preset: str | None
    config: SwitchConfig
    layers: tuple[Layer, ...]
    parameters: int
    expert_parameters: int
    dtypes: Mapping[str, int]
    files: int | None
    bytes_on_disk: int | None
    damaged: tuple[Shard, ...]
    memory: Mapping[str, int]
    notes: tuple[str, ...]


@runtime_checkable
class HasShards(Protocol):
    """A reader that knows its files."""

    notes: list[str]

    def shards(self) -> Sequence[Shard]:
        """The files, each with its size and what is wrong with it."""
        ...


def inspect(reader: Reader) -> Inspection:
    """Counts what `reader` has, from shapes and file sizes: no tensor is read.

    Open the reader with `check=False` to see a damaged checkpoint's files in `damaged` rather than an error.
    """
    sizes = {name: math.prod(reader.shape(name)) for name in reader.names()}
    experts = {name: size for name, size in sizes.items() if is_expert(name)}
    dtypes: collections.Counter[str] = collections.Counter()
    for name, size in sizes.items():
        dtypes[reader.dtype(name).name] += size
    shards = reader.shards() if isinstance(reader, HasShards) else ()
    known = [shard.nbytes for shard in shards if shard.nbytes is not None]
    return Inspection(
        path=str(reader.path),
        format=reader.format,
        preset=next((name for name, preset in PRESETS.items() if preset == reader.config), None),
        config=reader.config,
        layers=tuple(_layers(reader.config, sizes)),
        parameters=sum(sizes.values()),
        expert_parameters=sum(experts.values()),
        dtypes=dict(dtypes),
        files=len(shards) if shards else None,
        bytes_on_disk=sum(known) if known else None,
        damaged=tuple(shard for shard in shards if shard.problem),
        memory=_memory(reader, experts, sum(sizes.values()) - sum(experts.values())),
        notes=tuple(reader.notes) if isinstance(reader, HasShards) else (),
    )


def _layers(config: SwitchConfig, sizes: Mapping[str, int]) -> list[Layer]:
    parameters: collections.Counter[str] = collections.Counter()
    for name, size in sizes.items():
        parameters["/".join(name.split("/")[:2])] += size
    return [
        Layer(
            stack,
            i,
            config.num_experts if i in config.sparse_layers(stack) else 0,
            parameters[f"{stack}/layers_{i}"],
        )
        for stack in STACKS
        for i in range(config.num_layers(stack))
    ]


def _memory(reader: Reader, experts: Mapping[str, int], rest: int) -> dict[str, int]:
    weights = sum(experts.values())
    # An expert kernel is [expert, in, out], so its rows are its experts times its outputs.
    rows = sum(reader.shape(name)[0] * reader.shape(name)[2] for name in experts)
    memory = {"bfloat16": (weights + rest) * _BFLOAT16_BYTES}
    for form, (weight_bits, row_bits) in FORMS.items():
        memory[form] = rest * _BFLOAT16_BYTES + math.ceil((weights * weight_bits + rows * row_bits) / 8)
    return memory
