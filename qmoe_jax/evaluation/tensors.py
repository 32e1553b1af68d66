"""Two checkpoints of one architecture, read side by side, and the relative error of each tensor."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from qmoe_jax.checkpoints.params import nest, parameter_dtype
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.staging import staged
from qmoe_jax.config import SwitchConfig, TokenIds
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import scaled, transposed
from qmoe_jax.parameters import EMBEDDING, LOGITS, ExpertKernel, is_expert

Weights = dict[str, Array]
"""Matrices of a range of experts by name, float32 `[expert, in, out]` as T5X has them."""


def untied(reader: Checkpoint) -> Checkpoint:
    """Return a tied model as the untied one that computes the same."""
    head = scaled(transposed(reader.tensors[EMBEDDING]), reader.config.d_model**-0.5)
    return dataclasses.replace(
        reader,
        config=dataclasses.replace(reader.config, tied=False),
        tensors={**reader.tensors, LOGITS: head},
    )


@jax.jit
def _squares(
    w: Float[Array, "*rows in"], q: Float[Array, "*rows in"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Return Σ(q - w)² and Σw² along the last axis.

    These sums are short, so float32 is exact enough; the rest is summed in float64.
    """
    return jnp.sum(jnp.square(q - w), axis=-1), jnp.sum(jnp.square(w), axis=-1)


class Pair:
    """An original and its compressed form, with the same tensors in the same shapes.

    Where one ties its output projection to the embedding and the other does not (upstream's directories store
    it apart, in another dtype), the tied one is taken as the untied model that computes the same; `notes`
    says so.
    """

    def __init__(self, original: Checkpoint, compressed: Checkpoint):
        """Match the tensors of the two.

        Raises:
            CheckpointError: a tensor is in one only, or has different shapes, or a token another id; the
                error names it.
        """
        self.notes: list[str] = []
        readers = [original, compressed]
        if original.config.tied != compressed.config.tied:
            tied = 0 if original.config.tied else 1
            self.notes.append(
                f"the head is tied to the embedding in {readers[tied].path}, and stored apart in "
                f"{readers[1 - tied].path}: compared as {LOGITS}"
            )
            readers[tied] = untied(readers[tied])
        self.original, self.compressed = readers
        _require_same_tensors(self.original, self.compressed)
        _require_same_token_ids(self.original, self.compressed)
        self.notes += _differences(self.original.config, self.compressed.config)
        self._squares: dict[str, np.ndarray] = {}

    @property
    def config(self) -> SwitchConfig:
        """The original's architecture."""
        return self.original.config

    @property
    def configs(self) -> tuple[SwitchConfig, SwitchConfig]:
        """Both architectures, which may differ in settings that change no tensor's shape."""
        return self.original.config, self.compressed.config

    @property
    def paths(self) -> tuple[Path | str, Path | str]:
        """Both checkpoints' paths."""
        return self.original.path, self.compressed.path

    def names(self, prefix: str) -> list[str]:
        """Return the parameters whose paths begin with `prefix`."""
        return [name for name in self.original.names() if name.startswith(prefix)]

    def read(self, name: str, dtype: DTypeLike) -> tuple[Array, Array]:
        """Read a parameter of each, cast to `dtype`, onto the default device."""
        original, compressed = (
            jax.device_put(reader.read_finite(name, dtype=dtype))
            for reader in (self.original, self.compressed)
        )
        return original, compressed

    def params(self, names: Iterable[str], dtype: DTypeLike) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read and measure parameters of both, as nested dicts cast for a model that computes in `dtype`."""
        originals, compresseds = {}, {}
        for name in names:
            w, q = self.read(name, np.float32)
            self._measure(name, w, q)
            cast = parameter_dtype(name, dtype)
            originals[name], compresseds[name] = w.astype(cast), q.astype(cast)
        return nest(originals), nest(compresseds)

    @contextlib.contextmanager
    def staged(self, layer: str, size: int, scratch: str | os.PathLike[str]) -> Iterator[Pair]:
        """Yield the pair for reading a layer's experts, `size` at a time in ascending order.

        Stored chunks that span more experts are read once, through files in `scratch` that the context
        removes.
        """
        count = self.config.num_experts
        if size >= count:
            yield self
            return
        names = list(filter(is_expert, self.names(f"{layer}/")))
        ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
        reads = [(name, experts) for experts in ranges for name in names]
        with (
            staged(self.original, scratch, reads) as original,
            staged(self.compressed, scratch, reads) as compressed,
        ):
            pair = copy.copy(self)  # measures into the same sums
            pair.original, pair.compressed = original, compressed
            yield pair

    def experts(self, layer: str, experts: range) -> tuple[Weights, Weights]:
        """Read and measure a range of a layer's experts of each."""
        weights: tuple[Weights, Weights] = ({}, {})
        for name in filter(is_expert, self.names(f"{layer}/")):
            matrix = ExpertKernel.parse(name).matrix
            for reader, mine in zip((self.original, self.compressed), weights, strict=True):
                part = slice(experts.start, experts.stop)
                mine[matrix] = jax.device_put(reader.read_finite(name, part, dtype=np.float32))
            self._measure(name, weights[0][matrix], weights[1][matrix])
        return weights

    def _measure(self, name: str, w: Float32[Array, "*shape"], q: Float32[Array, "*shape"]) -> None:
        """Add a tensor, or a range of its experts, to the sums of squares of its error."""
        sums = np.array([np.sum(part, dtype=np.float64) for part in map(np.asarray, _squares(w, q))])
        if not np.isfinite(sums).all():  # squares beyond float32's range: from 1.8e19 on
            wide, other = np.asarray(w, np.float64), np.asarray(q, np.float64)
            sums = np.array([np.sum(np.square(other - wide)), np.sum(np.square(wide))])
        self._squares[name] = self._squares.get(name, 0.0) + sums

    def errors(self) -> dict[str, float]:
        """Return ‖Q - W‖ / ‖W‖ of every tensor measured so far, 0 where both are zero."""
        return {name: _relative(*sums) for name, sums in sorted(self._squares.items())}


def _relative(difference: float, norm: float) -> float:
    if difference == 0:
        return 0.0
    return math.sqrt(difference / norm) if norm else math.inf


def _require_same_tensors(original: Checkpoint, compressed: Checkpoint) -> None:
    for reader, other in ((original, compressed), (compressed, original)):
        if missing := sorted(set(other.names()) - set(reader.names())):
            raise CheckpointError(
                f"{len(missing)} tensors of {other.path} are missing: the two are not one model",
                path=reader.path,
                key=", ".join(missing[:3]),
            )
    for name in original.names():
        if original.shape(name) != compressed.shape(name):
            raise CheckpointError(
                f"a tensor has not the shape that it has in {original.path}: the two are not one model",
                path=compressed.path,
                key=name,
                expected=original.shape(name),
                found=compressed.shape(name),
            )


def _require_same_token_ids(original: Checkpoint, compressed: Checkpoint) -> None:
    ours, theirs = original.config.token_ids, compressed.config.token_ids
    for field in dataclasses.fields(TokenIds):
        if (want := getattr(ours, field.name)) != (found := getattr(theirs, field.name)):
            raise CheckpointError(
                f"a token has not the id that it has in {original.path}: the two do not read the same texts",
                path=compressed.path,
                key=f"{field.name}_token_id",
                expected=want,
                found=found,
                remedy=f"correct {field.name}_token_id in the config.json that is wrong",
            )


def _differences(original: SwitchConfig, compressed: SwitchConfig) -> list[str]:
    """Return a note for each setting in which the two configurations differ."""
    fields = (field.name for field in dataclasses.fields(SwitchConfig))
    both = {name: (getattr(original, name), getattr(compressed, name)) for name in fields}
    return [
        f"{name} is {a} in the original, {b} in the compressed: each is run as it is"
        for name, (a, b) in both.items()
        if a != b
    ]
