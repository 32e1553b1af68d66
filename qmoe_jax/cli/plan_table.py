"""A plan as a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from qmoe_jax.compression.planning.plan import CompressionPlan, PlannedPass
from qmoe_jax.compression.planning.resources import Terms

STAGES = {
    "read": "reading and inflating",
    "compute": "on the devices",
    "code": "coding",
    "store": "writing",
}


def plan_table(plan: CompressionPlan) -> Table:
    """Return a table of what a compression reads, writes, holds and takes."""
    resources, tokens = plan.resources, plan.resources.tokens
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify = f"plan for {plan.checkpoint}", "left"
    add = lambda name, text: table.add_row(name, Text(text))
    add("text", f"{tokens.samples:,} samples, {tokens.encoder:,} + {tokens.decoder:,} tokens")
    add("machine", f"{plan.rates.name} ({plan.rates.source})")
    if plan.hosts > 1 or resources.devices > 1:
        add("", f"{plan.hosts} hosts of {resources.devices} devices")
    stored = "unknown size" if plan.stored_bytes is None else size(plan.stored_bytes)
    add("checkpoint", f"{stored} on disk, {size(plan.decoded_bytes)} decoded")
    for name, terms, limit in (
        ("memory", resources.memory, plan.limits.memory),
        ("device memory", resources.device, plan.limits.device),
        ("scratch", resources.scratch, plan.limits.scratch),
        ("artifact", resources.artifact, plan.limits.artifact),
    ):
        if name == "device memory" and resources.on_host:
            continue
        there = "" if limit is None else f" of {size(limit)}"
        add(name, f"{size(sum(terms.values()))}{there}: {_terms(terms)}")
    add(
        "bits",
        f"{plan.bits_per_weight:.2f} per expert weight, with as many zeros as in QMoE's paper",
    )
    read, written = (sum(getattr(each, name) for each in plan.passes) for name in ("read", "written"))
    add("disk", f"{size(read)} read, {size(written)} written in all")
    flops = ", ".join(f"{kind} {_flops(count)}" for kind, count in plan.flops.items())
    add("flops", flops)
    for name, text in _times(plan):
        add(name, text)
    return table


def _times(plan: CompressionPlan) -> Iterator[tuple[str, str]]:
    """Yield rows of the time of steps, stages and all."""
    name = "time"
    for first, last, passes in _alike(plan.passes):
        each = " + ".join(f"{_seconds(p.seconds)} {p.name.partition(', ')[2]}" for p in passes)
        which = first if first == last else f"{first} to {last.rpartition(' ')[2]}, each"
        yield name, f"{which}: {each}"
        name = ""
    joint = "one after another" if plan.rates.shares_cores else "at once"
    stages = ", ".join(f"{_seconds(plan.stages[stage])} {text}" for stage, text in STAGES.items())
    yield "stages", f"{joint}: {stages}"
    yield "in all", _seconds(plan.seconds)


def _alike(passes: tuple[PlannedPass, ...]) -> Iterator[tuple[str, str, list[PlannedPass]]]:
    """Yield runs of steps of one stack that take the same time: first and last step, passes of the first."""
    steps = [
        (name, list(group))
        for name, group in itertools.groupby(passes, lambda each: each.name.partition(", ")[0])
    ]
    same = lambda step: (step[0].rpartition(" ")[0], [round(each.seconds, 6) for each in step[1]])
    for _, run in itertools.groupby(steps, same):
        alike = list(run)
        yield alike[0][0], alike[-1][0], alike[0][1]


def _terms(terms: Terms) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in terms.items())


def size(count: float) -> str:
    """Return bytes with a unit."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def _flops(count: float) -> str:
    return f"{count:.2g}"


def _seconds(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
