"""Throughput of reading prompts and writing tokens, and where the time goes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qmoe_jax.data.batching import round_up
from qmoe_jax.distributed import mesh_of, split, split_rows
from qmoe_jax.inference.generate import decode_tokens, encode_prompt, written_lengths
from qmoe_jax.inference.placement import ExpertStatistics, expert_statistics, raise_store_errors
from qmoe_jax.inference.sampling import Sampling
from qmoe_jax.models import SwitchTransformer
from qmoe_jax.settings import own_settings

RANDOM_TOKENS = Sampling(1.0)
"""Sampling at temperature 1: greedy tokens soon repeat, and with them the experts."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of generation: reading the prompts, or writing.

    Attributes:
        tokens: tokens of all rows together, read or written.
        seconds: wall-clock time.
        experts: statistics of the expert store meanwhile; None where experts are on the device.
    """

    tokens: int
    seconds: float
    experts: ExpertStatistics | None

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all rows together."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with milliseconds and bytes read per token."""
        fields: dict[str, Any] = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        if self.experts is not None:
            waited, computed = self.experts.io_wait_seconds, self.experts.compute_seconds
            fields["milliseconds_per_token"] = {
                "io_wait": 1e3 * waited / self.tokens,
                "experts": 1e3 * computed / self.tokens,
                "other": 1e3 * (self.seconds - waited - computed) / self.tokens,
            }
            fields["bytes_read_per_token"] = self.experts.bytes_read / self.tokens
            fields["experts"] = self.experts.to_json()
        return fields


@dataclasses.dataclass(frozen=True)
class Throughput:
    """The result of `Generator.measure`.

    Attributes:
        batch: rows.
        prompt: tokens per row that were read.
        reading: reading the prompts.
        writing: writing new tokens.
    """

    batch: int
    prompt: int
    reading: Phase
    writing: Phase


class Generator:
    """Generation for one shape of prompts, compiled ahead of time so that expert caches are not changed."""

    @own_settings()
    def __init__(
        self,
        model: SwitchTransformer,
        params: dict[str, Any],
        shape: tuple[int, int],
        new_tokens: int,
        sampling: Sampling = RANDOM_TOKENS,
    ):
        """Compile both phases.

        Args:
            model: the module.
            params: its parameters; those on a mesh of devices split the rows over them.
            shape: rows and length of the prompts.
            new_tokens: tokens to write per row.
            sampling: how they are drawn.
        """
        self.params, self.shape, self.new_tokens = params, shape, new_tokens
        self._key, self._eos_id = jax.random.key(0), model.config.eos_id
        self._mesh = mesh_of(params)
        rows, length = shape
        if self._mesh is not None:
            rows = round_up(rows, self._mesh.size)
        tokens, mask = self._struct((rows, length), jnp.int32), self._struct((rows, length), jnp.bool_)
        encoded = jax.eval_shape(lambda *inputs: encode_prompt(model, *inputs), params, tokens, mask)
        self._read = encode_prompt.lower(model, params, tokens, mask).compile()
        encoded = self._struct(encoded.shape, encoded.dtype)
        self._write = decode_tokens.lower(
            model, params, encoded, mask, self._key, new_tokens, sampling
        ).compile()

    def _struct(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Return the form of an argument whose first axis counts rows."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=None if self._mesh is None else split(self._mesh))

    @own_settings()
    def measure(self, prompts: Int[np.ndarray, "b n"]) -> Throughput:
        """Generate and measure. Raises `CheckpointError` where experts on disk cannot be read."""
        tokens, mask = jnp.asarray(prompts, jnp.int32), jnp.ones(prompts.shape, bool)
        tokens, mask = split_rows(self._mesh, tokens, mask)
        with raise_store_errors(self.params):
            encoded, seconds, experts = self._timed(lambda: self._read(self.params, tokens, mask))
            reading = Phase(prompts.size, seconds, experts)
            written, seconds, experts = self._timed(
                lambda: self._write(self.params, encoded, mask, self._key)
            )
        rows, length = prompts.shape
        new = int(written_lengths(np.asarray(written)[:rows], self._eos_id).sum())
        return Throughput(rows, length, reading, Phase(new, seconds, experts))

    def _timed(self, run: Callable[[], jax.Array]) -> tuple[jax.Array, float, ExpertStatistics | None]:
        statistics = expert_statistics(self.params)
        if statistics is not None:
            statistics.reset()
        began = time.perf_counter()
        result = run().block_until_ready()
        seconds = time.perf_counter() - began
        return result, seconds, None if statistics is None else dataclasses.replace(statistics)
