"""One pass over the expert groups of a layer: calibration, quantization, coding, and the tokens behind it.

Groups go in waves of one per device. While a wave is computed, the weights and tokens of the next one are
read ahead, and the groups before it are coded and written; queues are bounded, and tokens come in chunks of
one shape, so that memory depends neither on their number nor on how unevenly they are routed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.kinds import LEVEL_DTYPES
from qmoe_jax.artifact.matrices import PackedExpertMatrix, pack_matrix
from qmoe_jax.artifact.report import GroupReport, MatrixReport
from qmoe_jax.compression.passes.attention import AttentionPass
from qmoe_jax.compression.passes.pipeline import Stage, Worker, ahead
from qmoe_jax.compression.passes.wave import (
    Found,
    all_finite,
    calibrate,
    factor,
    forward,
    no_hessians,
    parts_of,
    place,
    quantize,
    restore,
)
from qmoe_jax.compression.planning.costs import Kind
from qmoe_jax.compression.planning.work import WorkTally
from qmoe_jax.compression.resume import GroupStore
from qmoe_jax.compression.tokens.chunks import CHUNKS_AHEAD, Chunk, group_rows, most_rows, side_by_side
from qmoe_jax.compression.tokens.group_part import GroupPart
from qmoe_jax.compression.tokens.routing import GroupTokens, Routing
from qmoe_jax.compression.tokens.store import TokenStore
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.finite import read_as
from qmoe_jax.parameters import ExpertKernel, expert_matrices, input_matrices


@dataclasses.dataclass(frozen=True)
class Job:
    """One expert group of a layer.

    Attributes:
        number: of the group in its layer, as the token store counts.
        key: the group.
        finished: whether an earlier run has quantized it, so that it is read from the artifact.
        quantizes: whether it is to be quantized. Neither: its experts stay as they are.
    """

    number: int
    key: GroupKey
    finished: bool
    quantizes: bool

    @property
    def experts(self) -> range:
        """The group's experts."""
        return range(self.key.start, self.key.stop)


@dataclasses.dataclass(frozen=True)
class _Input:
    """A group with its experts, original or as an earlier run made them, and its tokens."""

    job: Job
    weights: dict[str, Any]
    tokens: GroupTokens


@dataclasses.dataclass(frozen=True)
class ExpertPass:
    """The experts of one layer.

    Attributes:
        attention: the pass before it.
        groups: the artifact's groups, and the original experts.
        routed: the tokens before the experts, by group.
        routing: where each of them goes.
        computed: folder for the tokens behind the experts; None where nothing comes after them.
        scale: of the norm in front of the experts, on every device.
        stages: times of reading, computing, coding, and storing tokens.
        tally: counts the work.
    """

    attention: AttentionPass
    groups: GroupStore
    routed: TokenStore
    routing: Routing
    computed: Path | None
    scale: Array
    stages: Mapping[str, Stage]
    tally: WorkTally

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.attention.mesh

    @cached_property
    def rows(self) -> int:
        """Tokens of a chunk: the same for every group of the layer, so that their sums are too."""
        most = int(np.bincount(self.routing.expert).max()) * self.groups.config.experts_per_group
        return min(most_rows(self.attention.model), max(16, 1 << (most - 1).bit_length()))

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the groups, and quantize those that are to be.

        Raises:
            CheckpointError: an expert, a Hessian, a level or a hidden state is not finite; or the disk
                refuses.
        """
        waves = list(_waves(jobs, self.mesh.size))
        compute, code, store = (self.stages[name] for name in ("compute", "code", "store"))
        self._expect(jobs)
        with contextlib.ExitStack() as stack:
            coder = stack.enter_context(Worker(code, compute, depth=1))
            keeper = stack.enter_context(Worker(store, compute, depth=2))
            inputs = stack.enter_context(ahead(self._inputs(waves), self.stages["weights"], compute, depth=1))
            chunks = stack.enter_context(
                ahead(self._chunks(waves), self.stages["tokens"], compute, depth=CHUNKS_AHEAD)
            )
            for _ in waves:
                with compute.working():
                    self._run_wave(next(inputs), chunks, coder, keeper)

    def _expect(self, jobs: Sequence[Job]) -> None:
        """Tell the tally how many tokens will be computed on."""
        count = lambda tokens: np.bincount(tokens, minlength=self.attention.model.num_experts)
        routed, chosen = count(self.routing.expert), count(self.routing.expert[self.routing.calibrates])
        calibrated = sum(chosen[job.key.start : job.key.stop].sum() for job in jobs if job.quantizes)
        passes = 2 if self.groups.config.true_sequential else 1
        self.tally.expect(Kind.CALIBRATE, passes * int(calibrated))
        if self.computed is not None:
            self.tally.expect(
                Kind.FORWARD, int(sum(routed[job.key.start : job.key.stop].sum() for job in jobs))
            )

    def _inputs(self, waves: Sequence[Sequence[Job]]) -> Iterator[list[_Input]]:
        """Read the experts of each wave's groups, and find their tokens."""
        for wave in waves:
            yield [
                _Input(
                    job,
                    self.groups.quantized(job.key) if job.finished else self.groups.original(job.key),
                    self.routing.of_group(job.experts),
                )
                for job in wave
            ]

    def _chunks(self, waves: Sequence[Sequence[Job]]) -> Iterator[Chunk | None]:
        """Yield the chunks of every pass over every wave's tokens, in the order of use; None after each."""
        for wave in waves:
            tokens = [self.routing.of_group(job.experts) for job in wave]
            for calibration in self._passes(wave[0]):
                chosen = [
                    group_rows(self.routed, job.number, mine, self.rows, calibrating=calibration)
                    for job, mine in zip(wave, tokens, strict=True)
                ]
                yield from side_by_side(chosen, self.rows, self.attention.model.d_model, self.mesh.size)
                yield None

    def _passes(self, job: Job) -> Iterator[bool]:
        """Yield, for each pass over the tokens of a group, whether it is one of calibration."""
        config = self.groups.config
        if job.quantizes and config.method == "gptq":
            yield from [True] * (2 if config.true_sequential else 1)
        if self.computed is not None:
            yield False

    def _run_wave(
        self, inputs: Sequence[_Input], chunks: Iterator[Chunk | None], coder: Worker, keeper: Worker
    ) -> None:
        began, wave = time.monotonic(), [each.job for each in inputs]
        matrices = {}
        for name in expert_matrices(self.attention.model):
            parts = [each.weights.pop(name) for each in inputs]
            parts += [jax.tree.map(np.zeros_like, parts[0])] * (self.mesh.size - len(wave))
            placed = jax.tree.map(lambda *arrays: place(self.mesh, arrays), *parts)
            finished = wave[0].finished
            matrices[name] = restore(self.mesh, *placed, self.groups.config.grid) if finished else placed
            del parts, placed
        if wave[0].quantizes:
            found = self._quantize(wave, matrices, chunks)
            coder.submit(self._code, inputs, found, began)
            self.tally.advance(Kind.QUANTIZE, sum(len(job.experts) for job in wave))
        if self.computed is not None:
            self._forward(inputs, matrices, chunks, keeper)

    def _quantize(
        self, wave: Sequence[Job], matrices: dict[str, Array], chunks: Iterator[Chunk | None]
    ) -> dict[str, Found]:
        """Quantize the matrices, which are replaced by what they become."""
        config, model, mesh = self.groups.config, self.attention.model, self.mesh
        calibrates = config.method == "gptq"
        found: dict[str, Found] = {}
        inputs = input_matrices(model)
        first, second = None, None
        if calibrates:
            wanted = (True, not config.true_sequential)
            first, second = self._calibrate(wave, matrices, chunks, wanted)
        for name in expert_matrices(model):
            if calibrates and name == inputs[0]:
                known, first = self._factor(wave, first, name), None
            elif calibrates and name == "wo":
                known = None  # the first factor is dropped before the larger one is made
                if config.true_sequential:
                    _, second = self._calibrate(wave, matrices, chunks, (False, True))
                known, second = self._factor(wave, second, name), None
            elif not calibrates:
                known = None
            found[name], matrices[name] = quantize(
                mesh, matrices[name], known, config.grid, group_size=config.group_size
            )
        jax.block_until_ready(matrices["wo"])
        for name, each in found.items():
            for job, levels in zip(wave, parts_of(each.levels), strict=False):
                key = f"{ExpertKernel(job.key.stack, job.key.layer, name).path}, levels"
                dtype = LEVEL_DTYPES[self.groups.kinds[name].level_dtype]
                read_as(np.asarray(levels), dtype, path=self.attention.path, key=key, first=job.key.start)
        return found

    def _calibrate(
        self,
        wave: Sequence[Job],
        matrices: Mapping[str, Array],
        chunks: Iterator[Chunk | None],
        wanted: tuple[bool, bool],
    ) -> tuple[Any, Any]:
        """Return the Hessians of the inputs of `wi` and of `wo`, those that are wanted."""
        model, mesh, count = self.attention.model, self.mesh, len(wave[0].experts)
        widths = (model.d_model, model.d_ff)
        hessians: Any = tuple(
            no_hessians(mesh, count, width) if want else None
            for width, want in zip(widths, wanted, strict=True)
        )
        wi = tuple(matrices[name] for name in input_matrices(model)) if wanted[1] else ()
        under_way: deque[Array] = deque()
        while (chunk := next(chunks)) is not None:
            hessians, ready = calibrate(
                mesh, model, self.scale, hessians, place(mesh, chunk.x), place(mesh, chunk.expert), wi
            )
            under_way.append(ready)
            if len(under_way) > CHUNKS_AHEAD:
                jax.block_until_ready(under_way.popleft())
            self.tally.advance(Kind.CALIBRATE, sum(chunk.valid))
        first, second = hessians
        return first, second

    def _factor(self, wave: Sequence[Job], hessians: Any, matrix: str) -> Any:
        """Factor Hessians once they are known to be finite."""
        for job, fine in zip(wave, parts_of(all_finite(self.mesh, hessians)), strict=False):
            if not (numbers := np.asarray(fine)).all():
                raise self._overflows(job.key, matrix, int(numbers.argmin()))
        config = self.groups.config
        return factor(self.mesh, hessians, config.damping, activation_order=config.activation_order)

    def _overflows(self, key: GroupKey, matrix: str, expert: int) -> CheckpointError:
        """Return the error for an expert of a group whose Hessian is not finite."""
        return CheckpointError(
            "the inputs of an expert's matrix overflow on the calibration tokens",
            path=self.attention.path,
            key=f"{ExpertKernel(key.stack, key.layer, matrix).path}, expert {key.start + expert}",
            expected="sums of squares that are finite in float32",
            found="infinity or NaN",
            remedy="the weights in front of it are too large: take another copy of the checkpoint, or "
            "quantize without Hessians (method nearest)",
        )

    def _code(self, inputs: Sequence[_Input], found: Mapping[str, Found], began: float) -> None:
        """Pack and write the groups of a wave, the record of each last."""
        split = {
            name: [jax.tree.unflatten(jax.tree.structure(each), part) for part in _leaf_parts(each)]
            for name, each in found.items()
        }
        for index, each in enumerate(inputs):
            mine = {name: parts[index] for name, parts in split.items()}
            self._code_group(each.job, each.tokens, mine, began)

    def _code_group(self, job: Job, tokens: GroupTokens, found: Mapping[str, Found], began: float) -> None:
        key, groups = job.key, self.groups
        on_accelerator = self.mesh.devices.flat[0].platform != "cpu"  # which then encodes them
        packed: dict[str, list[PackedExpertMatrix]] = {}
        levels: dict[str, np.ndarray] = {}
        reports: dict[str, MatrixReport] = {}
        for name, each in found.items():
            kind = groups.kinds[name]
            levels[name], indexes = np.asarray(each.levels), np.asarray(each.group_index)
            digits: Any = each.digits if on_accelerator else np.asarray(each.digits)
            packed[name] = [
                pack_matrix(kind, digits[e], levels[name][e], groups.codebooks, group_index=indexes[e])
                for e in range(len(job.experts))
            ]
            figures = {name: tuple(np.asarray(a).tolist()) for name, a in each.figures._asdict().items()}
            if groups.config.method != "gptq":
                figures["fallback"] = (False,) * len(job.experts)
            reports[name] = MatrixReport(bytes=tuple(matrix.nbytes for matrix in packed[name]), **figures)
        experts = [{name: packed[name][e] for name in packed} for e in range(len(job.experts))]
        report = GroupReport(
            key.stack, key.layer, key.start, tokens.routed, tokens.calibration, reports,
            time.monotonic() - began, groups.producer,
        )  # fmt: skip
        groups.write(key, experts, levels, report)

    def _forward(
        self,
        inputs: Sequence[_Input],
        matrices: Mapping[str, Array],
        chunks: Iterator[Chunk | None],
        keeper: Worker,
    ) -> None:
        """Run the tokens of a wave through its experts, and store what they become."""
        assert self.computed is not None
        model, mesh = self.attention.model, self.mesh
        wi = tuple(matrices[name] for name in input_matrices(model))
        parts = [self._part(each.job, each.tokens) for each in inputs]
        while (chunk := next(chunks)) is not None:
            x, fine = forward(
                mesh, model, self.scale, place(mesh, chunk.x), place(mesh, chunk.expert),
                place(mesh, chunk.probability), wi, matrices["wo"],
            )  # fmt: skip
            keeper.submit(_keep, parts, chunk.valid, x, fine)
            self.tally.advance(Kind.FORWARD, sum(chunk.valid))
        for part in parts:
            keeper.submit(part.finish)

    def _part(self, job: Job, tokens: GroupTokens) -> GroupPart:
        """Begin the part that holds the tokens behind a group."""
        assert self.computed is not None
        attention = self.attention

        def refuse(row: int) -> CheckpointError:
            return attention.overflow(f"layer {attention.sparse}, experts", int(tokens.numbers[row]))

        return GroupPart(self.computed, job.number, self.routed, refuse)


def _keep(parts: Sequence[GroupPart], valid: Sequence[int], x: Array, fine: Array) -> None:
    """Hand each device's tokens to the part that they belong to."""
    for part, count, rows, good in zip(parts, valid, parts_of(x), parts_of(fine), strict=False):
        part.append(np.asarray(rows)[:count], np.asarray(good)[:count])


def _waves(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Yield runs of up to `size` groups of one size and kind of work."""
    wave: list[Job] = []
    alike = lambda job: (len(job.experts), job.quantizes, job.finished)
    for job in jobs:
        if wave and (len(wave) == size or alike(job) != alike(wave[0])):
            yield wave
            wave = []
        wave.append(job)
    if wave:
        yield wave


def _leaf_parts(found: Found) -> list[list[Array]]:
    """Return the leaves of each device's part."""
    return [list(part) for part in zip(*map(parts_of, jax.tree.leaves(found)), strict=True)]
