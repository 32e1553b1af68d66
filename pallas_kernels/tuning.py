"""How kernels are launched: an explicit choice, else the device's table of timed ones, else a heuristic.

The tables are data: `data/<device>.json`, written by `benchmarks/kernels.py`, holds the timings of all candidates
beside each choice. No heuristic here has been measured; benchmarks/NOTES.md has the counts behind each.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.backend import device_kind
from pallas_kernels.operands import PackedMatrix

DATA = pathlib.Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True)
class MatvecConfig:
    """A program takes `rows` rows of one token, `tile` codewords of each at a time, with `warps` warps."""

    rows: int
    tile: int
    warps: int


@dataclasses.dataclass(frozen=True)
class GatherConfig:
    """A program takes one row of a block of `lanes` tokens, `tile` codewords at a time, with `warps` warps."""

    tile: int
    lanes: int
    warps: int


@dataclasses.dataclass(frozen=True)
class TensorCoreConfig:
    """`programs` programs take turns at blocks of `rows` rows of the experts that have tokens.

    Each decodes its rows, `tile` codewords of each at a time, then multiplies them by `lanes` tokens at a time,
    `columns` columns a step, with `warps` warps and `stages` loads in flight.
    """

    rows: int
    tile: int
    lanes: int
    columns: int
    warps: int
    stages: int
    programs: int


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """A program takes one row, `tile` codewords at a time, with `warps` warps."""

    tile: int
    warps: int


@dataclasses.dataclass(frozen=True)
class RouteConfig:
    """Tokens an expert, on average, from which products gather tokens in blocks, and from which they are dense."""

    gather_from: int
    dense_from: int


Config = MatvecConfig | GatherConfig | TensorCoreConfig | DecodeConfig | RouteConfig
KINDS: dict[str, type[Any]] = {
    "matvec": MatvecConfig,
    "gather": GatherConfig,
    "tensor_core": TensorCoreConfig,
    "decode": DecodeConfig,
    "route": RouteConfig,
}
C = TypeVar("C", bound=Config)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a choice depends on.

    Attributes:
      kind: a key of `KINDS`.
      rows, width: of a matrix.
      codebook: codewords, words an entry and slots a word: "256x1x2".
      dtype: of the tokens, or of the weights that are decoded.
      share: tokens an expert on average, rounded up to a power of two; 1 where a choice does not depend on it.
    """

    kind: str
    rows: int
    width: int
    codebook: str
    dtype: str
    share: int = 1

    @classmethod
    def of(cls, kind: str, packed: PackedMatrix, dtype: Any, tokens: int = 0) -> Problem:
        """The problem of `tokens` tokens over the experts of `packed`."""
        codewords, words = packed.table.entries.shape
        codebook = f"{codewords}x{words}x{packed.table.slots}"
        share = 1 << (-(-max(tokens, 1) // packed.num_experts) - 1).bit_length()
        return cls(kind, packed.rows, packed.width, codebook, jnp.dtype(dtype).name, share)


def heuristic(problem: Problem) -> Any:
    """What counted instructions and bytes suggest, for an H100; not measured."""
    lanes = lambda least, most: min(max(least, problem.share), most)
    match problem.kind:
        case "matvec":
            return MatvecConfig(rows=4, tile=32, warps=4)
        case "gather":
            return GatherConfig(tile=32, lanes=lanes(8, 32), warps=1)
        case "tensor_core":
            return _tensor_core(problem, lanes)
        case "decode":
            return DecodeConfig(tile=128, warps=1)
        case "route":
            return RouteConfig(gather_from=2, dense_from=64)
    raise ValueError(f"expected a kind of {sorted(KINDS)}, found {problem.kind!r}")


def _tensor_core(problem: Problem, lanes: Callable[[int, int], int]) -> TensorCoreConfig:
    """Sixty-four rows, which the widest instructions need; float32 tokens take thrice the registers.

    Few columns, codewords and stages at a time: an expert's hidden activations are float32 behind bfloat16 tokens,
    and with more of them registers spill on an H100 or an A100 (benchmarks/gpu_compile.py).
    """
    common = functools.partial(TensorCoreConfig, rows=64, columns=32, programs=264)
    if problem.dtype == "float32":
        return common(lanes=lanes(16, 64), tile=32, warps=4, stages=3)
    return common(lanes=lanes(16, 128), tile=16, warps=4 if problem.share < 64 else 8, stages=2)


def choose(problem: Problem, explicit: C | None = None, *, strict: bool = False) -> Any:
    """How to launch: `explicit` if given, else the table's choice, else the heuristic's.

    Raises:
      TypeError: the explicit configuration is that of another kind.
      LookupError: `strict`, and the table has no choice: a benchmark must not report a guess as a tuned kernel.
    """
    if explicit is not None:
        if type(explicit) is not KINDS[problem.kind]:
            raise TypeError(f"{problem.kind}: expected a {KINDS[problem.kind].__name__}, found {explicit!r}")
        return explicit
    device = device_kind()
    table = load_table(table_path(device))
    if problem in table:
        return table[problem]
    if strict:
        raise LookupError(
            f"nothing tuned for {problem} on {device!r} in {table_path(device)}: run benchmarks/kernels.py there"
        )
    return heuristic(problem)


def table_path(device: str) -> pathlib.Path:
    """Where the table of a kind of device lies: 'NVIDIA H100 80GB HBM3' -> data/nvidia-h100-80gb-hbm3.json."""
    return DATA / f"{'-'.join(device.lower().split())}.json"


@functools.cache
def load_table(path: pathlib.Path) -> dict[Problem, Any]:
    """The choices in a file that `tuned_table` made; none where there is no file.

    Raises:
      ValueError: an entry is not of the shape that this version writes.
    """
    if not path.exists():
        return {}
    table = {}
    for entry in json.loads(path.read_text())["choices"]:
        try:
            problem = Problem(**entry["problem"])
            table[problem] = KINDS[problem.kind](**entry["config"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a choice of this version ({error}): {entry}") from error
    return table


@dataclasses.dataclass(frozen=True)
class Trial:
    """A configuration with its seconds, or why it could not run."""

    config: Config
    seconds: float
    failure: str | None = None


def autotune(problem: Problem, candidates: Iterable[C], time: Callable[[C], float]) -> dict[str, Any]:
    """Times each candidate: an entry of the device's table, as JSON.

    Candidates that cannot be compiled or launched, too large for shared memory or registers, are kept with their
    reason.

    Args:
      problem: what they are for.
      candidates: configurations of its kind.
      time: seconds of one launch; raises what the compiler raises.

    Raises:
      RuntimeError: no candidate could run.
    """
    trials = [_trial(candidate, time) for candidate in candidates]
    best = min(trials, key=lambda trial: trial.seconds, default=None)
    if best is None or best.failure is not None:
        raise RuntimeError(f"{problem}: no candidate ran: {[trial.failure for trial in trials]}")
    return {
        "problem": dataclasses.asdict(problem),
        "config": dataclasses.asdict(best.config),
        "microseconds": round(1e6 * best.seconds, 3),
        "trials": [
            {"config": dataclasses.asdict(trial.config)}
            | (
                {"microseconds": round(1e6 * trial.seconds, 3)}
                if trial.failure is None
                else {"failure": trial.failure}
            )
            for trial in trials
        ],
    }


def _trial(config: Any, time: Callable[[Any], float]) -> Trial:
    try:
        return Trial(config, time(config))
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return Trial(config, math.inf, f"{type(error).__name__}: {error}"[:300])


def tuned_table(device: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """What to store at `table_path(device)`."""
    return {"device": device, "jax": jax.__version__, "choices": choices}
