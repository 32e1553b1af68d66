"""Work in units whose time is known, and progress as the share of the time that has passed.

Experts, tokens and bytes cost differently, and how they compare differs between machines. So each phase of a
run begins with a predicted time, from shapes and a machine's rates, and each kind of work has a pace, the
time it really takes as a multiple of what was predicted. Time left is predicted time at the pace seen so far.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

from qmoe_jax.compression.costs import ExpertStorage, Kind, PassCost, TokenCounts, pass_costs
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.rates import Rates
from qmoe_jax.config import SwitchConfig
from qmoe_jax.progress import ProgressCallback

TOTAL = 1_000_000
"""Units that progress is reported in: millionths of the time."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """Work of one kind in one step.

    Attributes:
        step: name of the step.
        stack: "encoder" or "decoder"; another word for work of neither.
        kind: the kind.
        units: as `Kind` says.
        seconds: predicted time.
    """

    step: str
    stack: str
    kind: Kind
    units: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Work:
    """The phases of a run, in their order."""

    phases: tuple[Phase, ...]

    @classmethod
    def of(
        cls,
        model: SwitchConfig,
        config: CompressionConfig,
        tokens: TokenCounts,
        rates: Rates,
        *,
        storage: ExpertStorage = ExpertStorage(),  # noqa: B008 (frozen)
        copied_bytes: float = 0.0,
        devices: int = 1,
        hosts: int = 1,
    ) -> Work:
        """Return one host's share of a compression.

        Args:
            model: the architecture.
            config: the options.
            tokens: size of the calibration text.
            rates: of this machine, as far as known.
            storage: of the checkpoint's experts.
            copied_bytes: bytes of the parameters outside of compressed experts, copied in the step "dense".
            devices: devices of each host.
            hosts: number of hosts.
        """
        phases = [
            phase
            for cost in pass_costs(model, config, tokens, storage)
            for phase in _phases(cost, rates, devices, hosts)
        ]
        if copied_bytes:
            seconds = copied_bytes / rates.read + copied_bytes / rates.write
            phases.append(Phase("dense", "", Kind.COPY, copied_bytes, seconds))
        return cls(tuple(phases))

    def remaining(self, done: Mapping[tuple[str, Kind], float]) -> Work:
        """Return what remains after an earlier run.

        Args:
            done: the share, 0 to 1, of phases that are done, by name of the step and kind.
        """
        left = []
        for phase in self.phases:
            share = 1 - done.get((phase.step, phase.kind), 0.0)
            if share > 0:
                units, seconds = share * phase.units, share * phase.seconds
                left.append(dataclasses.replace(phase, units=units, seconds=seconds))
        return Work(tuple(left))

    @property
    def seconds(self) -> float:
        """Predicted time of all phases."""
        return sum(phase.seconds for phase in self.phases)


def _phases(cost: PassCost, rates: Rates, devices: int, hosts: int) -> list[Phase]:
    """Return the phases of a pass; what it waits for reading or writing is spread over its kinds of work."""
    computing = {kind: amount.seconds(rates) for kind, amount in cost.work.items()}
    scale = cost.seconds(rates, devices, hosts) / (sum(computing.values()) or 1.0)
    return [
        Phase(cost.step.name, cost.step.stack, kind, amount.units / hosts, computing[kind] * scale)
        for kind, amount in cost.work.items()
    ]


@dataclasses.dataclass
class _Pace:
    """Time taken and time predicted for the same work."""

    taken: float = 0.0
    predicted: float = 0.0
    first: tuple[float, float] | None = None

    def add(self, taken: float, predicted: float) -> None:
        if self.first is None:
            self.first = taken, predicted
        self.taken, self.predicted = self.taken + taken, self.predicted + predicted

    @property
    def ratio(self) -> float | None:
        """Time taken per time predicted; None until something was done."""
        if self.first is None:
            return None
        # The first piece of work includes compilation: it does not count where there is more to go by.
        taken, predicted = self.taken - self.first[0], self.predicted - self.first[1]
        if predicted < self.first[1]:
            taken, predicted = self.taken, self.predicted
        return taken / predicted if predicted else None


@dataclasses.dataclass
class _Progress:
    """The state of a phase.

    Attributes:
        phase: the phase.
        done: units done.
        expected: units in all, once known.
        over: whether the run has gone on to another step.
    """

    phase: Phase
    done: float = 0.0
    expected: float | None = None
    over: bool = False


class WorkTally:
    """Work done so far, reported to a callback as the share of the time that has passed.

    Times are those of the thread that calls: what it waits for others counts as the work it waits with.
    """

    def __init__(self, work: Work, progress: ProgressCallback, clock: Callable[[], float] = time.monotonic):
        """Report to `progress` that nothing is done.

        Args:
            work: what is to be done.
            progress: called with `TOTAL` units.
            clock: returns seconds.
        """
        self._progress, self._clock = progress, clock
        self._phases = {(phase.step, phase.kind): _Progress(phase) for phase in work.phases}
        self._paces: dict[tuple[str, Kind], _Pace] = {}
        self._began = self._last = clock()
        self._step, self._label, self._reported = "", "", 0
        self._report(0)

    def begin(self, step: str, part: str = "") -> None:
        """Report that a part of a step begins. What was left of other steps' work is not there any more."""
        if step != self._step:
            for progress in self._phases.values():
                if progress.done and not progress.over and progress.phase.step != step:
                    progress.over, progress.expected = True, progress.done
                elif progress.phase.step == self._step:
                    progress.over = True
        self._step, self._label = step, f"{step}, {part}" if part else step
        self._report(self._units())

    def expect(self, kind: Kind, units: float) -> None:
        """Correct the predicted units of a kind of work in this step."""
        if (progress := self._phases.get((self._step, kind))) is not None:
            progress.expected = max(units, progress.done)

    def advance(self, kind: Kind, units: float) -> None:
        """Report that so many more units of a kind of work are done in this step."""
        now = self._clock()
        taken, self._last = now - self._last, now
        if (progress := self._phases.get((self._step, kind))) is not None:
            phase = progress.phase
            progress.done += units
            pace = self._paces.setdefault((phase.stack, kind), _Pace())
            pace.add(taken, phase.seconds * units / phase.units if phase.units else 0.0)
        self._report(self._units())

    def end(self) -> None:
        """Report that all is done."""
        self._report(TOTAL)

    @property
    def seconds_left(self) -> float:
        """Predicted time of what is left, at the pace so far."""
        return sum(self._left(progress) for progress in self._phases.values() if not progress.over)

    def _left(self, progress: _Progress) -> float:
        phase = progress.phase
        if not phase.units:
            return 0.0
        expected = progress.expected
        if expected is None:
            expected = phase.units * self._found_share(phase.stack, phase.kind)
        units = max(expected - progress.done, 0.0)
        return phase.seconds * units / phase.units * self._ratio(phase.stack, phase.kind)

    def _found_share(self, stack: str, kind: Kind) -> float:
        """Return the units that steps of a stack turned out to have, as a multiple of those predicted."""
        known = [
            progress
            for progress in self._phases.values()
            if progress.expected is not None and (progress.phase.stack, progress.phase.kind) == (stack, kind)
        ]
        predicted = sum(progress.phase.units for progress in known)
        return sum(progress.expected or 0.0 for progress in known) / predicted if predicted else 1.0

    def _ratio(self, stack: str, kind: Kind) -> float:
        """Return the pace of a kind of work: in the stack, else in the other one, else of all work."""
        own = self._paces.get((stack, kind))
        if own is not None and own.ratio is not None:
            return own.ratio
        alike = [pace for (_, other), pace in self._paces.items() if other == kind and pace.ratio is not None]
        known = alike or [pace for pace in self._paces.values() if pace.ratio is not None]
        predicted = sum(pace.predicted for pace in known)
        return sum((pace.ratio or 0.0) * pace.predicted for pace in known) / predicted if predicted else 1.0

    def _units(self) -> int:
        passed, left = self._clock() - self._began, self.seconds_left
        return min(int(TOTAL * passed / (passed + left)) if passed else 0, TOTAL - 1)

    def _report(self, units: int) -> None:
        self._reported = max(units, self._reported)
        self._progress(self._reported, TOTAL, self._label)
