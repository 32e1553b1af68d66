"""Projects the hours of a whole compression from shapes and a machine's rates, term by term.

    python -m benchmarks.projection

Prints the table for switch-c-2048 on one H100, from stated rates, in a moment. Amounts are those of
`qmoe_jax.compression.planning.costs`, which `qmoe compress --dry-run` plans with.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import qmoe_jax as qj
from qmoe_jax.compression.planning.costs import ExpertStorage, PassCost, TokenCounts, pass_costs
from qmoe_jax.compression.planning.rates import PRESETS, Rates

PAPER = TokenCounts.of_text(160_000, 568)
"""Calibration of switch-c-2048 in the paper: samples, and tokens of each text before it is masked."""

T5X = ExpertStorage(span=256, inflated=True)
"""Experts as T5X stored those of switch-c-2048."""

_UNITS = {
    "hessian": ("Hessians", "PFLOP", 1e15),
    "cholesky": ("factorization", "PFLOP", 1e15),
    "gptq": ("GPTQ", "PFLOP", 1e15),
    "attention": ("attention", "PFLOP", 1e15),
    "product": ("tokens through experts", "PFLOP", 1e15),
    "inflate": ("inflating chunks", "TB", 1e12),
    "read": ("reading", "TB", 1e12),
    "write": ("writing", "TB", 1e12),
    "encode": ("encoding weights", "T", 1e12),
}


@dataclasses.dataclass(frozen=True)
class Term:
    """One kind of work.

    Attributes:
        name: in words.
        amount: flops, bytes or weights.
        unit: of the amount as it is shown.
        scale: flops, bytes or weights per unit.
        rate: amount per second.
    """

    name: str
    amount: float
    unit: str
    scale: float
    rate: float

    @property
    def hours(self) -> float:
        """Hours that this work takes by itself."""
        return self.amount / self.rate / 3600

    def __str__(self) -> str:
        amount, rate = self.amount / self.scale, self.rate / self.scale * 1000
        milli = {"PFLOP": "TFLOP", "TB": "GB", "T": "G"}[self.unit]
        rated = f"{rate:9,.3f} {milli}/s"
        return f"{self.name:24} {amount:9,.2f} {self.unit:5} / {rated:17} = {self.hours:8.2f} h"


@dataclasses.dataclass(frozen=True)
class Projection:
    """The time of a whole compression on one machine.

    Attributes:
        terms: the work, each kind by itself.
        stages: hours of each stage.
        hours: of the run: pass by pass the slowest stage, or all of them where they share the same cores.
        rates: of the machine.
    """

    terms: tuple[Term, ...]
    stages: dict[str, float]
    hours: float
    rates: Rates

    def to_json(self) -> dict[str, Any]:
        """Return the projection as JSON's types."""
        terms = [{**dataclasses.asdict(term), "hours": term.hours} for term in self.terms]
        rates = dataclasses.asdict(self.rates)
        return {"terms": terms, "stages": self.stages, "hours": self.hours, "rates": rates}

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {hours:.1f}" for name, hours in self.stages.items())
        how = "one after the other on the same cores" if self.rates.shares_cores else "at once, pass by pass"
        return "\n".join(
            [
                f"{self.rates.name} ({self.rates.source}):",
                *map(str, self.terms),
                f"stages, hours each: {stages}; {how}: {self.hours:.1f} h",
            ]
        )


def project(
    model: qj.SwitchConfig,
    config: qj.CompressionConfig,
    tokens: TokenCounts,
    storage: ExpertStorage,
    rates: Rates,
    *,
    devices: int = 1,
    hosts: int = 1,
) -> Projection:
    """Return the projection of a compression on `devices` devices in each of `hosts` hosts."""
    costs = list(pass_costs(model, config, tokens, storage))
    stages: collections.Counter[str] = collections.Counter()
    for cost in costs:
        stages.update({name: s / 3600 for name, s in cost.stages(rates, devices, hosts).items()})
    seconds = sum(cost.seconds(rates, devices, hosts) for cost in costs)
    return Projection(_terms(costs, rates, devices * hosts, hosts), dict(stages), seconds / 3600, rates)


def _terms(costs: Sequence[PassCost], rates: Rates, devices: int, hosts: int) -> tuple[Term, ...]:
    """Return each kind of work of all passes, at the rate of all devices or of all hosts together."""
    amounts: collections.Counter[str] = collections.Counter()
    for cost in costs:
        for amount in cost.work.values():
            amounts.update(amount.flops)
        amounts.update(
            {"inflate": cost.inflated, "read": cost.read, "write": cost.written, "encode": cost.encoded}
        )
    on_host = {"inflate", "read", "write", "encode"}
    return tuple(
        Term(name, amounts[key], unit, scale, getattr(rates, key) * (hosts if key in on_host else devices))
        for key, (name, unit, scale) in _UNITS.items()
        if amounts[key]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(qj.PRESETS), default="switch-c-2048")
    parser.add_argument("--machine", choices=sorted(PRESETS), default="h100")
    parser.add_argument("--samples", type=int, default=PAPER.samples)
    parser.add_argument("--devices", type=int, default=1, help="per host")
    parser.add_argument("--hosts", type=int, default=1)
    options = parser.parse_args()
    projection = project(
        qj.PRESETS[options.preset],
        qj.CompressionConfig(),
        TokenCounts.of_text(options.samples, 568),
        T5X,
        PRESETS[options.machine],
        devices=options.devices,
        hosts=options.hosts,
    )
    print(f"{options.preset}, {options.samples:,} samples, {options.hosts} x {options.devices} devices")
    print(projection)


if __name__ == "__main__":
    main()
