"""The class of every opened checkpoint: named tensors that are read lazily."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.finite import read_as
from qmoe_jax.files.tensor import Shard, Tensor, read_all
from qmoe_jax.parameters import is_expert


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint of any format, with its parameters under T5X's paths.

    Kernels are [in, out], expert kernels [expert, in, out]. Nothing is read before it is asked for.

    Attributes:
        path: a directory or a URL.
        format: name of the format.
        config: the architecture.
        tensors: the parameters, `encoder/layers_0/attention/query/kernel` and so on.
        list_shards: looks at the files, anew each time; costs a directory listing and a few bytes of each
            file.
        notes: what opening had to decide, such as a config.json that contradicts the tensors.
    """

    path: Path | str
    format: str
    config: SwitchConfig
    tensors: Mapping[str, Tensor]
    list_shards: Callable[[], Sequence[Shard]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def names(self) -> list[str]:
        """Return the names of all parameters, sorted."""
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter. Raises `CheckpointError` if there is none of that name."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Return the stored dtype of a parameter. Raises `CheckpointError` if there is none of that name."""
        return self._tensor(name).dtype

    def read(self, name: str, experts: slice | None = None) -> np.ndarray:
        """Return a parameter in its stored dtype, or the range `experts` of an expert kernel, as a new array.

        Raises:
            CheckpointError: the parameter does not exist, or its file is damaged.
            ValueError: `experts` is given for a parameter without experts, or has a step.
        """
        tensor = self._tensor(name)
        if experts is None:
            return read_all(tensor)
        if not is_expert(name):
            raise ValueError(f"{name} has no expert axis")
        start, stop, step = experts.indices(tensor.shape[0])
        if step != 1:
            raise ValueError(f"{name}: expected a range of experts, found a step of {step}")
        return tensor.read(slice(start, max(start, stop)))

    def read_finite(
        self, name: str, experts: slice | None = None, *, dtype: npt.DTypeLike | None = None
    ) -> np.ndarray:
        """Return what `read` does, cast to `dtype` (by default as stored), once every number is finite.

        Raises:
            CheckpointError: as `read`; or a number is NaN or infinite, as stored or after the cast: it names
                the expert and the position.
            ValueError: as `read`.
        """
        array = self.read(name, experts)
        first = (experts or slice(None)).indices(self.shape(name)[0])[0] if is_expert(name) else None
        return read_as(array, dtype or array.dtype, path=self.path, key=name, first=first)

    def shards(self) -> Sequence[Shard]:
        """Return the files, each with its size and what is wrong with it (missing, cut short)."""
        return self.list_shards()

    def require_whole(self) -> None:
        """Raise `CheckpointError` naming the first files that are missing or damaged, if any are."""
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
