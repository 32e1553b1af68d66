"""A comparison of variants as a folder: report.json, report.md and the plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qmoe_jax.artifact.report import UNDER_CALIBRATED, CompressionReport, fallback_reason, to_json
from qmoe_jax.evaluation.plots import plot_layers, plot_loss_against_bits, plot_tokens
from qmoe_jax.evaluation.variants import Variant
from qmoe_jax.files.durable import durable_file, make_folder, write_durably
from qmoe_jax.files.errors import printable

COLUMNS = (
    "",
    "loss",
    "perplexity",
    "bits/expert param",
    "bits/param",
    "ratio",
    "sparsity",
    "entropy",
    "seconds",
)
REPORT_FILES = ("report.json", "report.md", "loss.png", "layers.png", "tokens.png")
"""Names of the files of a report; the plots are those that the variants have figures for."""

LEGEND = (
    "bits: measured on disk, including headers, codebooks and padding; ratio: bfloat16 experts to these; "
    "entropy: lower bound in bits per digit of a code that treats digits as independent"
)


def table_rows(variants: Sequence[Variant]) -> list[tuple[str, ...]]:
    """Return the cells under `COLUMNS`, one row per variant."""
    return [
        (
            variant.name,
            f"{variant.evaluation.loss:.4f}",
            f"{variant.evaluation.perplexity:.2f}",
            f"{variant.bits_per_expert_parameter:.3f}",
            f"{variant.bits_per_parameter:.3f}",
            f"{variant.expert_compression_ratio:.1f}",
            *_report_cells(variant.report),
        )
        for variant in variants
    ]


def _report_cells(report: CompressionReport | None) -> tuple[str, str, str]:
    """Return sparsity, entropy and seconds, a dash for each that there is not."""
    if report is None:
        return "–", "–", "–"
    entropy = "–" if report.entropy is None else f"{report.entropy:.3f}"
    return f"{report.sparsity:.1%}", entropy, "–" if report.seconds is None else f"{report.seconds:.1f}"


def markdown_table(variants: Sequence[Variant]) -> str:
    """Return the comparison as a Markdown table."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *table_rows(variants)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def calibration_notes(report: CompressionReport) -> list[str]:
    """Return a sentence per layer with experts that were rounded to nearest or had few calibration tokens."""
    notes, starved = [], report.under_calibrated()
    for layer in report.layers:
        reasons: dict[str, list[str]] = {}
        for expert in layer.fallback:
            count = layer.calibration_tokens[expert]
            reasons.setdefault(fallback_reason(count), []).append(f"{expert} ({count} tokens)")
        notes += [
            f"{layer.name}: rounded to nearest, {reason}: experts {', '.join(named)}"
            for reason, named in reasons.items()
        ]
        few = {e: count for e, count in starved.get(layer.name, {}).items() if e not in layer.fallback}
        if few:
            named = ", ".join(f"{expert} ({count} tokens)" for expert, count in few.items())
            notes.append(
                f"{layer.name}: fewer than {UNDER_CALIBRATED:.0%} of the mean number of calibration tokens: "
                f"experts {named}"
            )
    return notes


def write_report(folder: str | Path, variants: Sequence[Variant], facts: Mapping[str, Any]) -> None:
    """Write the folder; `facts` (model, data, command) head the report, in their order."""
    folder = Path(folder)
    make_folder(folder)
    content = to_json({"facts": dict(facts), "variants": [variant.to_json() for variant in variants]})
    write_durably(folder / "report.json", [(json.dumps(content, indent=1, allow_nan=False) + "\n").encode()])
    compressed = [variant for variant in variants if variant.report and variant.report.groups]
    plots: dict[str, tuple[str, Callable[[Sequence[Variant], BinaryIO], None], Sequence[Variant]]] = {
        "loss.png": ("Loss against bits per expert parameter", plot_loss_against_bits, variants),
        "layers.png": ("Sparsity, bits and output error per layer", plot_layers, compressed),
        "tokens.png": ("Calibration tokens per expert", plot_tokens, compressed[-1:]),
    }
    lines = ["# Compression report", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [markdown_table(variants), "", LEGEND, ""]
    for variant in compressed:
        if variant.report and (notes := calibration_notes(variant.report)):
            lines += [f"**{variant.name}**", "", *(f"- {note}" for note in notes), ""]
    for file, (title, plot, shown) in plots.items():
        if shown:
            with durable_file(folder / file) as stream:
                plot(shown, stream)
            lines += [f"## {title}", "", f"![{title}]({file})", ""]
    write_durably(folder / "report.md", [printable("\n".join(lines)).encode()])
