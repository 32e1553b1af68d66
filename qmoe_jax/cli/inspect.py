"""qmoe inspect: shows what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

import qmoe_jax as qj
from qmoe_jax.artifact.inspect import Inspection, Layer
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.artifact.report import RunReport
from qmoe_jax.artifact.sizes import Sizes, measure
from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.compress import mixed
from qmoe_jax.cli.console import warn
from qmoe_jax.cli.models import CheckpointPath


def inspect(path: CheckpointPath) -> Answer:
    """Show what a checkpoint holds, without reading its tensors.

    Configuration (inferred from the tensors' shapes), layers, experts,
    parameters, bytes on disk, the memory that each compressed form would need,
    and files that are missing or damaged; for a compressed model also its bits
    per parameter.

    Examples:
        $ qmoe inspect switch-base-128
        $ qmoe inspect gs://bucket/switch/checkpoint_500100
        $ qmoe inspect mini-ternary --json | jq .compression.bits_per_expert_parameter
    """
    checkpoint = qj.open_checkpoint(path, check=False)
    found = qj.inspect(checkpoint)
    fields: dict[str, Any] = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    shown = [_facts(found), _layers(found), _memory(found)]
    if isinstance(checkpoint, ArtifactReader) and not found.damaged:
        sizes = measure(checkpoint.path)
        fields["compression"] = _compression(checkpoint, sizes)
        shown.insert(1, _compression_table(checkpoint, sizes))
    warnings = [Text(f"{shard.name}: {shard.problem}", style="red") for shard in found.damaged]
    notes = [Text(f"note: {text}", style="dim") for text in found.notes]
    return Answer(fields, (*shown, *warnings, *notes))


def _facts(found: Inspection) -> Table:
    config = found.config
    share = found.expert_parameters / max(found.parameters, 1)
    size = found.bytes_on_disk
    feed_forward = f"{'gated ' if config.gated else ''}{config.activation}"
    facts = {
        "format": found.format,
        "architecture": found.preset or "not one of the published models",
        "parameters": f"{found.parameters:,}",
        "in experts": f"{found.expert_parameters:,} ({share:.1%})",
        "experts": f"{config.num_experts} in {len(config.encoder_sparse_layers)} + "
        f"{len(config.decoder_sparse_layers)} layers",
        "layers": f"{config.num_encoder_layers} encoder + {config.num_decoder_layers} decoder",
        "width": f"{config.d_model}, feed-forward {config.d_ff} ({feed_forward})",
        "attention": f"{config.num_heads} heads of {config.d_kv}",
        "vocabulary": f"{config.vocab_size:,}, {'tied' if config.tied else 'separate'} output projection",
        "stored as": ", ".join(f"{dtype} ({count:,})" for dtype, count in found.dtypes.items()),
        "on disk": "unknown" if size is None else f"{decimal(size)} in {found.files:,} files",
    }
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify = found.path, "left"
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _layers(found: Inspection) -> Table:
    """Return a table with one row per run of equal layers."""
    table = Table("layers", "experts", "parameters per layer")
    for column in table.columns[1:]:
        column.justify = "right"
    alike = lambda layer: (layer.stack, layer.experts, layer.parameters)
    for (stack, experts, parameters), run in itertools.groupby(_interleaved(found.layers), key=alike):
        numbers = [layer.index for layer in run]
        table.add_row(
            f"{stack} {_ranges(numbers)}", f"{experts:,}" if experts else "dense", f"{parameters:,}"
        )
    return table


def _interleaved(layers: tuple[Layer, ...]) -> list[Layer]:
    """Return the layers sorted by kind: stack by stack, kinds in the order of their first layers."""
    first: dict[tuple[str, int, int], int] = {}
    for place, layer in enumerate(layers):
        first.setdefault((layer.stack, layer.experts, layer.parameters), place)
    return sorted(layers, key=lambda layer: first[layer.stack, layer.experts, layer.parameters])


def _ranges(numbers: list[int]) -> str:
    """Return numbers as text: 0-4 for a range, else 1, 3, 5."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _memory(found: Inspection) -> Table:
    table = Table("experts as", "memory of the model")
    table.columns[1].justify = "right"
    for form, size in found.memory.items():
        table.add_row(form if form == "bfloat16" else f"{form} (estimate)", decimal(size))
    return table


def _compression(artifact: ArtifactReader, sizes: Sizes) -> dict[str, Any]:
    ratios = ("bits_per_expert_parameter", "bits_per_parameter", "compression_ratio")
    return {
        "options": artifact.manifest.run.options,
        "producers": _producers(artifact),
        "source": artifact.manifest.run.source,
        **{name: getattr(sizes, name) for name in ratios},
        "sizes": sizes,
    }


def _producers(artifact: ArtifactReader) -> tuple[Mapping[str, str], ...]:
    """Return what made the artifact's groups; nothing where its report is damaged."""
    try:
        return RunReport.read(artifact.path).producers
    except qj.CheckpointError as error:
        warn(error)
        return ()


def _compression_table(artifact: ArtifactReader, sizes: Sizes) -> Table:
    options = artifact.manifest.run.options
    table = Table.grid(padding=(0, 2))
    table.add_row("compressed", ", ".join(f"{name} {value}" for name, value in options.items() if value))
    if len(producers := _producers(artifact)) > 1:
        table.add_row("made by", Text(mixed(producers), style="yellow"))
    table.add_row("bits", f"{sizes.bits_per_expert_parameter:.4f} per expert parameter, everything counted")
    table.add_row("", f"{sizes.bits_per_parameter:.4f} per parameter of the whole model")
    table.add_row("ratio", f"{sizes.compression_ratio:.1f} times smaller than bfloat16")
    return table
