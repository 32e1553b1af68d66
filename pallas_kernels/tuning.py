"""Chooses launch configurations (explicit, else tuned for the device, else heuristic) and measures them.

A kernel defines its own `Config`, a frozen dataclass with a heuristic, in its own file. Tuned choices are
data: `data/<device>.json`, written by `python -m benchmarks.kernels`, stores the timings of all candidates
with each choice.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.backend import device_kind
from pallas_kernels.operands import PackedMatrix

DATA = pathlib.Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The key of a choice: everything that it depends on, besides the device.

    Attributes:
        kind: the `kind` of the configuration.
        rows, width: of a matrix.
        codebook: codewords, words per entry and slots per word: "256x1x2".
        dtype: that of the tokens, or of the weights that are decoded.
        tokens_per_expert: the average, rounded up to a power of two; 1 where the choice does not depend on
            it.
    """

    kind: str
    rows: int
    width: int
    codebook: str
    dtype: str
    tokens_per_expert: int = 1

    @classmethod
    def of(cls, kind: str, packed: PackedMatrix, dtype: Any, tokens: int = 0) -> Problem:
        """Return the key for `tokens` tokens over the experts of `packed`."""
        codewords, words = packed.table.entries.shape
        codebook = f"{codewords}x{words}x{packed.table.slots}"
        tokens_per_expert = 1 << (-(-max(tokens, 1) // packed.num_experts) - 1).bit_length()
        return cls(kind, packed.rows, packed.width, codebook, jnp.dtype(dtype).name, tokens_per_expert)


class Config(abc.ABC):
    """A launch configuration of one kernel: the base of a frozen dataclass of integers.

    Attributes:
        kind: the name of the kernel in tuned tables.
    """

    kind: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def heuristic(cls, problem: Problem) -> Any:
        """Return an untuned configuration."""


C = TypeVar("C", bound=Config)


def choose(config: type[C], problem: Problem, explicit: C | None = None, *, strict: bool = False) -> C:
    """Return the configuration to launch with: `explicit` if given, else the tuned one, else the heuristic's.

    Raises:
        TypeError: `explicit` is not a `config`.
        LookupError: `strict`, and nothing is tuned: a benchmark must not report a guess as a tuned kernel.
        ValueError: the tuned configuration does not have the fields of `config`.
    """
    if explicit is not None:
        if not isinstance(explicit, config):
            raise TypeError(f"{problem.kind}: expected a {config.__qualname__}, found {explicit!r}")
        return explicit
    device = device_kind()
    path = table_path(device)
    tuned = load_table(path).get(problem)
    if tuned is not None:
        try:
            return config(**tuned)
        except TypeError as error:
            raise ValueError(f"{path}: {problem}: not a configuration of this version ({error})") from error
    if strict:
        message = (
            f"nothing tuned for {problem} on {device!r} in {path}: run `python -m benchmarks.kernels` there"
        )
        raise LookupError(message)
    return config.heuristic(problem)


def table_path(device: str) -> pathlib.Path:
    """Return the file of a kind of device: 'NVIDIA H100 80GB HBM3' -> data/nvidia-h100-80gb-hbm3.json."""
    return DATA / f"{'-'.join(device.lower().split())}.json"


@functools.cache
def load_table(path: pathlib.Path) -> dict[Problem, dict[str, int]]:
    """Return the configurations in a file made by `tuned_table`, as fields; none without a file.

    Raises:
        ValueError: an entry does not have the form that this version writes.
    """
    if not path.exists():
        return {}
    table = {}
    for entry in json.loads(path.read_text())["choices"]:
        try:
            table[Problem(**entry["problem"])] = entry["config"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a choice of this version ({error}): {entry}") from error
    return table


@dataclasses.dataclass(frozen=True)
class Trial:
    """A configuration with its time in seconds, or the reason why it could not run."""

    config: Any
    seconds: float
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the trial as it is stored."""
        outcome: dict[str, Any] = {"failure": self.failure}
        if self.failure is None:
            outcome = {"microseconds": round(1e6 * self.seconds, 3)}
        return {"config": dataclasses.asdict(self.config)} | outcome


def autotune(problem: Problem, candidates: Iterable[C], time: Callable[[C], float]) -> dict[str, Any]:
    """Time each candidate and return an entry of the device's table, as JSON.

    Candidates that cannot be compiled or launched, for example because they need too much shared memory, are
    kept with the reason.

    Args:
        problem: the key of the entry.
        candidates: configurations of its kind.
        time: returns the seconds of one launch; raises what the compiler raises.

    Raises:
        RuntimeError: no candidate could run.
    """
    trials = [_trial(candidate, time) for candidate in candidates]
    best = min(trials, key=lambda trial: trial.seconds, default=None)
    if best is None or best.failure is not None:
        raise RuntimeError(f"{problem}: no candidate ran: {[trial.failure for trial in trials]}")
    entry = {"problem": dataclasses.asdict(problem), **best.to_json()}
    return entry | {"trials": [trial.to_json() for trial in trials]}


def _trial(config: Any, time: Callable[[Any], float]) -> Trial:
    try:
        return Trial(config, time(config))
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return Trial(config, math.inf, f"{type(error).__name__}: {error}"[:300])


def tuned_table(device: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of the file at `table_path(device)`."""
    return {"device": device, "jax": jax.__version__, "choices": choices}
