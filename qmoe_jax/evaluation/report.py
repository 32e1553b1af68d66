"""A comparison of variants as a folder: report.json, report.md and the plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qmoe_jax.evaluation.plots import plot_layers, plot_loss_against_bits, plot_tokens
from qmoe_jax.evaluation.variants import BFLOAT16_BITS, Variant

COLUMNS = (
    "",
    "loss",
    "perplexity",
    "bits/expert param",
    "bits/param",
    "ratio",
    "zeros",
    "entropy",
    "seconds",
)
LEGEND = (
    "bits: measured on the disk, headers, codebooks and padding counted; ratio: bfloat16 experts to these; "
    "entropy: bits a digit that a code of independent digits needs at least"
)


def table_rows(variants: Sequence[Variant]) -> list[tuple[str, ...]]:
    """The cells under `COLUMNS`, a row a variant."""
    return [
        (
            variant.name,
            f"{variant.evaluation.loss:.4f}",
            f"{variant.evaluation.perplexity:.2f}",
            f"{variant.bits_per_expert_parameter:.3f}",
            f"{variant.bits_per_parameter:.3f}",
            f"{BFLOAT16_BITS / variant.bits_per_expert_parameter:.1f}",
            "–" if variant.sparsity is None else f"{variant.sparsity:.1%}",
            "–" if variant.entropy is None else f"{variant.entropy:.3f}",
            "–" if variant.seconds is None else f"{variant.seconds:.1f}",
        )
        for variant in variants
    ]


def markdown_table(variants: Sequence[Variant]) -> str:
    """The comparison as a Markdown table."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *table_rows(variants)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def calibration_notes(variant: Variant) -> list[str]:
    """What a user should know of an artifact's calibration: who got few tokens, who got none."""
    notes = []
    for layer in variant.layers:
        if layer.fallback:
            named = ", ".join(f"{expert} ({layer.tokens[expert]} tokens)" for expert in layer.fallback)
            notes.append(f"{layer.name}: rounded to nearest, for want of a usable Hessian: experts {named}")
        few = [
            expert
            for expert, count in enumerate(layer.tokens)
            if 0 < count < sum(layer.tokens) / len(layer.tokens) / 10
        ]
        if few:
            named = ", ".join(f"{expert} ({layer.tokens[expert]})" for expert in few)
            notes.append(
                f"{layer.name}: under a tenth of the even share of calibration tokens: experts {named}"
            )
    return notes


def write_report(folder: str | Path, variants: Sequence[Variant], facts: Mapping[str, Any]) -> None:
    """Write the folder; `facts` (model, data, command) head the report, in their order."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"facts": dict(facts), "variants": [variant.to_json() for variant in variants]}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    compressed = [variant for variant in variants if variant.layers]
    plots = {
        "loss.png": ("Loss against bits per expert parameter", plot_loss_against_bits, variants),
        "layers.png": ("Sparsity, bits and reconstruction error of each layer", plot_layers, compressed),
        "tokens.png": ("Calibration tokens of each expert", plot_tokens, compressed[-1:]),
    }
    lines = ["# Compression report", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [markdown_table(variants), "", LEGEND, ""]
    for variant in compressed:
        if notes := calibration_notes(variant):
            lines += [f"**{variant.name}**", "", *(f"- {note}" for note in notes), ""]
    for file, (title, plot, shown) in plots.items():
        if shown:
            plot(shown, folder / file)
            lines += [f"## {title}", "", f"![{title}]({file})", ""]
    (folder / "report.md").write_text("\n".join(lines))
