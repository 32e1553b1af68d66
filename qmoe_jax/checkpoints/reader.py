"""What every checkpoint looks like from outside: named tensors, read lazily, and one kind of error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import Shard, Tensor
from qmoe_jax.parameters import is_expert


@runtime_checkable
class Reader(Protocol):
    """A checkpoint of any format: tensors under T5X's paths, `encoder/layers_0/attention/query/kernel`."""

    @property
    def path(self) -> Path | str:
        """Where it lies: a directory or a URL."""
        ...

    @property
    def format(self) -> str:
        """The name of its format."""
        ...

    @property
    def config(self) -> SwitchConfig:
        """The architecture."""
        ...

    def names(self) -> list[str]:
        """Every parameter, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, without reading its data."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype of a parameter, without reading its data."""
        ...

    def read(self, name: str, experts: slice | None = None) -> np.ndarray:
        """A parameter, or a range of its experts (the first axis of expert kernels), in its stored dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class DenseReader:
    """A `Reader` over lazy tensors: what the module of each format builds.

    `notes` says what the reader had to decide, such as a config.json that contradicts the tensors.
    `list_shards` looks at the files again each time; it costs a directory listing, and a few bytes of each
    file.
    """

    path: Path | str
    format: str
    config: SwitchConfig
    tensors: Mapping[str, Tensor]
    list_shards: Callable[[], Sequence[Shard]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def names(self) -> list[str]:
        """Every parameter, sorted."""
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter. Raises `CheckpointError` if there is none of that name."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype of a parameter. Raises `CheckpointError` if there is none of that name."""
        return self._tensor(name).dtype

    def read(self, name: str, experts: slice | None = None) -> np.ndarray:
        """A parameter in its stored dtype, or the range `experts` of an expert kernel [expert, in, out].

        Raises `CheckpointError` where the file is damaged, `ValueError` for a range of a tensor without
        experts or with a step.
        """
        tensor = self._tensor(name)
        if experts is None:
            return tensor.read(slice(0, tensor.shape[0] if tensor.shape else 0))
        if not is_expert(name):
            raise ValueError(f"{name} has no expert axis")
        start, stop, step = experts.indices(tensor.shape[0])
        if step != 1:
            raise ValueError(f"experts are read in ranges, not with a step of {step}")
        return tensor.read(slice(start, max(start, stop)))

    def shards(self) -> Sequence[Shard]:
        """The checkpoint's files, each with its size and what is wrong with it (missing, cut short)."""
        return self.list_shards()

    def require_whole(self) -> None:
        """Raises `CheckpointError` naming the first files that are missing or damaged, if any are."""
        damaged = [shard for shard in self.shards() if shard.problem]
        if damaged:
            raise CheckpointError(
                f"{len(damaged)} files are missing or damaged",
                path=self.path,
                found="; ".join(f"{shard.name}: {shard.problem}" for shard in damaged[:3]),
                remedy="copy the checkpoint again",
            )

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(
                "no such parameter",
                path=self.path,
                key=name,
                expected=f"one of {len(self.tensors)} names, such as {min(self.tensors)}",
            )
        return self.tensors[name]
