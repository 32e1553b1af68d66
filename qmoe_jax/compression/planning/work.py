"""Work in units whose time is known, and progress as the share of the time that has passed.

Experts, tokens and bytes cost differently, and how they compare differs between machines. So each phase of a
run begins with a predicted time, from shapes and a machine's rates, and each kind of work has a pace, the
time it really takes as a multiple of what was predicted. Time left is predicted time at the pace seen so far.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.planning.costs import (
    SINGLE_EXPERTS,
    ExpertStorage,
    Kind,
    PassCost,
    TokenCounts,
    pass_costs,
)
from qmoe_jax.compression.planning.rates import Rates
from qmoe_jax.config import SwitchConfig
from qmoe_jax.progress import ProgressCallback

TOTAL = 1_000_000
"""Units that progress is reported in: millionths of the time."""


KEPT = "parameters that are kept"
"""Name of the step in front of the walk, in which what is not compressed is copied."""


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
        storage: ExpertStorage = SINGLE_EXPERTS,
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
            copied_bytes: bytes of the parameters that are kept as they are, copied in the step `KEPT`.
            devices: devices of each host.
            hosts: number of hosts.
        """
        phases = [
            phase
            for cost in pass_costs(model, config, tokens, storage)
            for phase in _phases(cost, rates, devices, hosts)
            if phase.units
        ]
        if copied_bytes:
            seconds = copied_bytes / rates.read + copied_bytes / rates.write
            phases.insert(0, Phase(KEPT, "", Kind.COPY, copied_bytes, seconds))
        return cls(tuple(phases))

    def remaining(self, done: Mapping[tuple[str, Kind], float]) -> Work:
        """Return what remains after an earlier run.

        Args:
            done: the share, 0 to 1, of phases that are done, by name of the step and kind.
        """
        left = []
        for phase in self.phases:
            share = 1 - done.get((phase.step, phase.kind), 0.0)
            if share > 0 and phase.units:
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
class _Open:
    """A phase of the step under way.

    Attributes:
        phase: the phase.
        expected: units in all: as predicted, then as they turn out to be.
        done: units done.
        known: whether `expected` was corrected.
    """

    phase: Phase
    expected: float
    done: float = 0.0
    known: bool = False


@dataclasses.dataclass
class _Kind:
    """The work of one kind in one stack.

    Attributes:
        ahead: predicted seconds of the steps that have not begun.
        pace: of what was done.
        found: units that steps turned out to have.
        predicted: units that these steps were predicted to have.
    """

    ahead: float = 0.0
    pace: _Pace = dataclasses.field(default_factory=_Pace)
    found: float = 0.0
    predicted: float = 0.0

    @property
    def share(self) -> float:
        """Units that steps turned out to have per unit predicted."""
        return self.found / self.predicted if self.predicted else 1.0


class WorkTally:
    """Work done so far, reported to a callback as the share of the time that has passed.

    Times are those of the thread that calls: what it waits for others counts as the work it waits with.
    """

    def __init__(self, work: Work, progress: ProgressCallback, clock: Callable[[], float] = time.monotonic):
        """Report to `progress` that nothing is done.

        Args:
            work: what is to be done, step by step in this order.
            progress: called with `TOTAL` units.
            clock: returns seconds.
        """
        self._progress, self._clock = progress, clock
        self._ahead = deque(work.phases)
        self._kinds: dict[tuple[str, Kind], _Kind] = {}
        for phase in work.phases:
            self._kinds.setdefault((phase.stack, phase.kind), _Kind()).ahead += phase.seconds
        self._open: dict[Kind, _Open] = {}
        self._began = self._last = clock()
        self._step, self._label, self._reported = "", "", 0
        self._report(0)

    def begin(self, step: str, part: str = "") -> None:
        """Report that a part of a step begins: the steps before it are over, whatever of them was done."""
        if step != self._step:
            self._close()
            if any(phase.step == step for phase in self._ahead):
                while self._ahead and self._ahead[0].step != step:
                    self._take()
                while self._ahead and self._ahead[0].step == step:
                    phase = self._take()
                    share = self._kinds[phase.stack, phase.kind].share
                    self._open[phase.kind] = _Open(phase, share * phase.units)
        self._step, self._label = step, f"{step}, {part}" if part else step
        self._report(self._units())

    def expect(self, kind: Kind, units: float) -> None:
        """Correct the predicted units of a kind of work in this step."""
        if (entry := self._open.get(kind)) is not None:
            entry.expected, entry.known = max(units, entry.done), True

    def advance(self, kind: Kind, units: float) -> None:
        """Report that so many more units of a kind of work are done in this step."""
        now = self._clock()
        taken, self._last = now - self._last, now
        if (entry := self._open.get(kind)) is not None:
            phase = entry.phase
            entry.done += units
            self._kinds[phase.stack, kind].pace.add(taken, phase.seconds * units / phase.units)
        self._report(self._units())

    def end(self) -> None:
        """Report that all is done."""
        self._report(TOTAL)

    @property
    def seconds_left(self) -> float:
        """Predicted time of what is left, at the pace so far."""
        left = sum(
            kind.ahead * kind.share * self._ratio(*key) for key, kind in self._kinds.items() if kind.ahead
        )
        for entry in self._open.values():
            units = max(entry.expected - entry.done, 0.0)
            phase = entry.phase
            left += phase.seconds * units / phase.units * self._ratio(phase.stack, phase.kind)
        return left

    def _take(self) -> Phase:
        """Return the next phase, which is then not ahead any more."""
        phase = self._ahead.popleft()
        kind = self._kinds[phase.stack, phase.kind]
        kind.ahead = max(kind.ahead - phase.seconds, 0.0)
        return phase

    def _close(self) -> None:
        """End the phases of a step, and learn how many units they had."""
        for entry in self._open.values():
            if entry.done or entry.known:
                kind = self._kinds[entry.phase.stack, entry.phase.kind]
                kind.found += entry.done
                kind.predicted += entry.phase.units
        self._open = {}

    def _ratio(self, stack: str, kind: Kind) -> float:
        """Return the pace of a kind of work: in the stack, else in the other one, else of all work."""
        own = self._kinds[stack, kind].pace.ratio
        if own is not None:
            return own
        alike = [each.pace for (_, other), each in self._kinds.items() if other == kind]
        return _mean_ratio(alike) or _mean_ratio([each.pace for each in self._kinds.values()]) or 1.0

    def _units(self) -> int:
        passed, left = self._clock() - self._began, self.seconds_left
        return min(int(TOTAL * passed / (passed + left)) if passed else 0, TOTAL - 1)

    def _report(self, units: int) -> None:
        self._reported = max(units, self._reported)
        self._progress(self._reported, TOTAL, self._label)


def _mean_ratio(paces: Sequence[_Pace]) -> float | None:
    """Return the mean ratio of paces, weighted by predicted time; None where none is known."""
    known = [(pace.ratio, pace.predicted) for pace in paces if pace.ratio is not None and pace.predicted]
    total = sum(predicted for _, predicted in known)
    return sum((ratio or 0.0) * predicted for ratio, predicted in known) / total if total else None
