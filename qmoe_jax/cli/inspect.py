"""qmoe inspect: what is in a checkpoint?"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.models import Checkpoint

if TYPE_CHECKING:
    from qmoe_jax.artifact.reader import ArtifactReader
    from qmoe_jax.artifact.sizes import Sizes
    from qmoe_jax.checkpoints.inspect import Inspection, Layer


def inspect(path: Checkpoint) -> Answer:
    """Tell what a checkpoint holds, without reading its tensors.

    Configuration (from the tensors' own shapes), layers, experts, parameters,
    bytes on the disk, the memory that each compressed form would need, and
    files that are missing or damaged; of a compressed model also its bits a
    parameter.

    Examples:
      $ qmoe inspect switch-base-128
      $ qmoe inspect gs://bucket/switch/checkpoint_500100
      $ qmoe inspect mini-ternary --json | jq .compression.bits_per_expert_parameter
    """
    import qmoe_jax as qj
    from qmoe_jax.artifact.reader import ArtifactReader
    from qmoe_jax.artifact.sizes import measure

    reader = qj.open_checkpoint(path, check=False)
    found = qj.inspect(reader)
    fields: dict[str, Any] = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    shown = [_facts(found), _layers(found), _memory(found)]
    if isinstance(reader, ArtifactReader) and not found.damaged:
        sizes = measure(reader.path)
        fields["compression"] = _compression(reader, sizes)
        shown.insert(1, _compression_table(reader, sizes))
    warnings = [Text(f"{shard.name}: {shard.problem}", style="red") for shard in found.damaged]
    notes = [Text(f"note: {text}", style="dim") for text in found.notes]
    return Answer(fields, (*shown, *warnings, *notes))


def _facts(found: Inspection) -> Table:
    config = found.config
    share = found.expert_parameters / max(found.parameters, 1)
    disk = (
        "unknown"
        if found.bytes_on_disk is None
        else f"{_bytes(found.bytes_on_disk)} in {found.files:,} files"
    )
    feed_forward = f"{'gated ' if config.gated else ''}{config.activation}"
    facts = {
        "format": found.format,
        "architecture": found.preset or "none of the published ones",
        "parameters": f"{found.parameters:,}",
        "in experts": f"{found.expert_parameters:,} ({share:.1%})",
        "experts": f"{config.num_experts} in {len(config.encoder_sparse_layers)} + "
        f"{len(config.decoder_sparse_layers)} layers",
        "layers": f"{config.num_encoder_layers} encoder + {config.num_decoder_layers} decoder",
        "width": f"{config.d_model}, feed-forward {config.d_ff} ({feed_forward})",
        "attention": f"{config.num_heads} heads of {config.d_kv}",
        "vocabulary": f"{config.vocab_size:,}, head {'tied to' if config.tied else 'apart from'} the embedding",
        "stored as": ", ".join(f"{dtype} ({count:,})" for dtype, count in found.dtypes.items()),
        "on disk": disk,
    }
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify = found.path, "left"
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _layers(found: Inspection) -> Table:
    """A row for each run of equal layers."""
    table = Table("layers", "experts", "parameters a layer")
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
    """Layers of a kind side by side: stack after stack, in each the kinds as they come first."""
    first: dict[tuple[str, int, int], int] = {}
    for place, layer in enumerate(layers):
        first.setdefault((layer.stack, layer.experts, layer.parameters), place)
    return sorted(layers, key=lambda layer: first[layer.stack, layer.experts, layer.parameters])


def _ranges(numbers: list[int]) -> str:
    """Numbers in short: 0-4, or 1, 3, 5."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _memory(found: Inspection) -> Table:
    table = Table("experts as", "memory for the model")
    table.columns[1].justify = "right"
    for form, size in found.memory.items():
        table.add_row(form if form == "bfloat16" else f"{form} (estimate)", _bytes(size))
    return table


def _compression(reader: ArtifactReader, sizes: Sizes) -> dict[str, Any]:
    ratios = ("bits_per_expert_parameter", "bits_per_parameter", "compression_ratio")
    return {
        "options": reader.manifest.run.options,
        "source": reader.manifest.run.source,
        **{name: getattr(sizes, name) for name in ratios},
        "sizes": sizes,
    }


def _compression_table(reader: ArtifactReader, sizes: Sizes) -> Table:
    options = reader.manifest.run.options
    table = Table.grid(padding=(0, 2))
    table.add_row("compressed", ", ".join(f"{name} {value}" for name, value in options.items() if value))
    table.add_row("bits", f"{sizes.bits_per_expert_parameter:.4f} an expert parameter, everything counted")
    table.add_row("", f"{sizes.bits_per_parameter:.4f} a parameter of the whole model")
    table.add_row("ratio", f"{sizes.compression_ratio:.1f} to bfloat16")
    return table


def _bytes(size: float) -> str:
    """Bytes in the largest decimal unit that leaves at least 1."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
