"""Plots the growth of memory and time that `benchmarks.compression_growth` measured.

python -m benchmarks.growth_plot benchmarks/results/compression-growth.json docs/images/growth.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qmoe_jax.evaluation.plots import COLORS, GRID, INK

Run = dict[str, Any]


def plot_growth(runs: Sequence[Run], path: Path) -> None:
    """Plot peak memory and seconds, each against tokens (even, and with a hot expert) and against experts."""
    fewest = min(run["experts"] for run in runs)
    even = [run for run in runs if run["hot"] is None and run["experts"] == fewest]
    hot = [run for run in runs if run["hot"] is not None]
    middle = sorted(run["tokens"] for run in even)[len(even) // 2]
    by_experts = [run for run in runs if run["hot"] is None and run["tokens"] == middle]
    share = f"one expert gets {hot[0]['hottest_share']:.0%} of the tokens" if hot else ""
    figure = Figure(figsize=(12.0, 3.4), layout="constrained")
    for column, (key, lines) in enumerate(
        (
            ("tokens", ((f"{fewest} experts, even", even), (share, hot))),
            ("experts", ((f"{middle:,} encoder tokens", by_experts),)),
        )
    ):
        for row, (label, value) in enumerate((("peak memory (GB)", _gigabytes), ("seconds", _seconds))):
            ax = figure.add_subplot(1, 4, 2 * column + row + 1)
            for color, (name, measured) in zip(COLORS, lines, strict=False):
                points = sorted(measured, key=lambda run: run[key])
                ax.plot(
                    [run[key] for run in points],
                    [value(run) for run in points],
                    "o-",
                    markersize=4,
                    color=color,
                    label=name,
                )
            ax.set_xscale("log")
            places = sorted({run[key] for _, measured in lines for run in measured})
            ax.set_xticks(places, [_short(place) for place in places], minor=False)
            ax.set_xticks([], minor=True)
            ax.set_ylim(bottom=0)
            ax.set_title(label, fontsize=10, color=INK)
            ax.set_xlabel("encoder tokens" if key == "tokens" else "experts per layer", color=INK)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color=GRID, linewidth=0.7)
            ax.set_axisbelow(True)
            ax.tick_params(colors=INK)
            ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _short(count: int) -> str:
    """Return a count in as few characters as fit below an axis."""
    return f"{count / 1000:,.0f}k" if count >= 10_000 else f"{count:,}"


_gigabytes: Callable[[Run], float] = lambda run: run["process"]["peak_bytes"] / 1e9
_seconds: Callable[[Run], float] = lambda run: run["seconds"]


if __name__ == "__main__":
    plot_growth(json.loads(Path(sys.argv[1]).read_text())["runs"], Path(sys.argv[2]))
