"""Plots of a comparison, drawn by matplotlib into files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from qmoe_jax.evaluation.variants import Variant

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    if error.name != "matplotlib":  # installed, but broken: the error itself says by what
        raise
    raise ModuleNotFoundError(
        "plots need matplotlib: pip install 'qmoe-jax[plots]'", name=error.name
    ) from error

INK, GRID = "#222222", "#dddddd"
COLORS = ("#1b6ca8", "#d1495b", "#2e933c", "#edae49", "#6a4c93", "#00798c")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure outside matplotlib's global state, and its axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color=GRID, linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK)
    return figure, axes


def plot_loss_against_bits(variants: Sequence[Variant], file: BinaryIO) -> None:
    """Plot the loss of each artifact against its bits per expert parameter; the original as a line."""
    figure, (ax,) = _figure(6.4, 4.0)
    shown = 0
    for variant in variants:
        if variant.report is None:
            ax.axhline(variant.evaluation.loss, color=INK, linewidth=1, linestyle="--")
            label = f"{variant.name} (16 bits): {variant.evaluation.loss:.3f}"
            ax.annotate(label, (0.5, variant.evaluation.loss), xycoords=("axes fraction", "data"),
                        ha="center", textcoords="offset points", xytext=(0, 4), color=INK,
                        fontsize=9)  # fmt: skip
            continue
        point = (variant.bits_per_expert_parameter, variant.evaluation.loss)
        ax.scatter(*point, s=60, color=COLORS[shown % len(COLORS)], zorder=3)
        ax.annotate(variant.name, point, textcoords="offset points", color=INK,
                    xytext=(8, 6), fontsize=9)  # fmt: skip
        shown += 1
    ax.set_xlabel("bits per expert parameter on disk, including headers and codebooks")
    ax.set_ylabel("held-out loss (nats per token)")
    ax.margins(x=0.25, y=0.15)
    figure.savefig(file, dpi=150, format="png")


def plot_layers(variants: Sequence[Variant], file: BinaryIO) -> None:
    """Plot sparsity, bits and relative output error of each layer, one line per variant."""
    figure, axes = _figure(12.0, 3.6, columns=3)
    fields = (
        ("sparsity", "sparsity"),
        ("bits_per_parameter", "bits per expert parameter"),
        ("output_error", "relative output error"),
    )
    layers = {variant.name: variant.report.layers for variant in variants if variant.report}
    for ax, (field, title) in zip(axes, fields, strict=True):
        for color, (name, mine) in zip(COLORS, layers.items(), strict=False):
            ax.plot([getattr(layer, field) for layer in mine], "o-", markersize=4, color=color, label=name)
        names = [layer.name for layer in next(iter(layers.values()))]
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_ylim(bottom=0)
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150, format="png")


def plot_tokens(variants: Sequence[Variant], file: BinaryIO) -> None:
    """Plot the calibration tokens of the first variant's experts and their mean, one panel per layer."""
    report = variants[0].report
    layers = report.layers if report else ()
    figure, axes = _figure(min(3.0 * len(layers), 24.0), 3.0, columns=len(layers))
    for ax, layer in zip(axes, layers, strict=True):
        counts = np.sort(layer.calibration_tokens)[::-1]
        ax.bar(range(len(counts)), counts, color=COLORS[0], width=0.9)
        ax.axhline(counts.mean(), color=INK, linewidth=1, linestyle="--")
        ax.set_title(layer.name, fontsize=10, color=INK)
        ax.set_xlabel("experts, most tokens first", fontsize=8)
    axes[0].set_ylabel("calibration tokens")
    figure.savefig(file, dpi=150, format="png")
