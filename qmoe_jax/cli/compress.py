"""qmoe compress: a checkpoint's experts below one bit a parameter."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.console import note, stderr, working
from qmoe_jax.cli.failures import Interrupted
from qmoe_jax.cli.models import Checkpoint
from qmoe_jax.cli.samples import (
    ExtraIds,
    MaxTokens,
    SampleRules,
    Seed,
    Segment,
    Split,
    TokenizerFile,
    check_vocabulary,
    open_tokenizer,
    read_samples,
)

if TYPE_CHECKING:
    from qmoe_jax.artifact.report import CompressionReport, Fallback

BITS: dict[str, Literal["ternary", 2, 3, 4]] = {"ternary": "ternary", "2": 2, "3": 3, "4": 4}

NAMED = 8
"""Experts that a line of the table names; --json names them all."""

_panel: Any = {"rich_help_panel": "Quantization"}


def compress(
    path: Checkpoint,
    output: Annotated[
        Path,
        typer.Argument(
            help="The artifact's directory: new, or that of a run to go on with.", show_default=False
        ),
    ],
    calibration: Annotated[
        list[Path],
        typer.Option(
            help="Text to calibrate on: a .txt or .jsonl file (.gz or .xz too), or a folder of them. May be repeated.",
            show_default=False,
            rich_help_panel="Text",
        ),
    ],
    tokenizer: TokenizerFile = None,
    extra_ids: ExtraIds = 100,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            help="Calibration samples at most. QMoE took 10,000 for 128 experts a layer and 160,000 for 2,048.",
            rich_help_panel="Text",
        ),
    ] = 10_000,
    max_tokens: MaxTokens = None,
    segment: Segment = None,
    split: Split = None,
    seed: Seed = 0,
    bits: Annotated[
        Literal["ternary", "2", "3", "4"],
        typer.Option(
            help="Levels of a weight: ternary, which is coded below 1 bit, or 2 to the power of this.",
            **_panel,
        ),
    ] = "ternary",
    method: Annotated[
        Literal["gptq", "nearest"],
        typer.Option(
            help="gptq makes up for rounding errors on the calibration text; nearest rounds.", **_panel
        ),
    ] = "gptq",
    damping: Annotated[
        float,
        typer.Option(
            min=0.0, help="Share of a Hessian's mean diagonal that is added to its diagonal.", **_panel
        ),
    ] = 0.1,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="COLUMNS",
            help="Columns that share their levels.",
            show_default="the whole row",
            **_panel,
        ),
    ] = None,
    activation_order: Annotated[
        bool,
        typer.Option("--activation-order", help="Quantize the columns of large activations first.", **_panel),
    ] = False,
    true_sequential: Annotated[
        bool,
        typer.Option(
            "--true-sequential",
            help="Calibrate an expert's second matrix on the outputs of its quantized first one.",
            **_panel,
        ),
    ] = False,
    skip: Annotated[
        Literal["encoder", "decoder"] | None,
        typer.Option(help="Leave this stack uncompressed.", show_default="neither", **_panel),
    ] = None,
    keep_sentinels: Annotated[
        bool,
        typer.Option(
            "--keep-sentinels", help="Let the tokens that mark masked spans calibrate too.", **_panel
        ),
    ] = False,
    sentinel_start: Annotated[
        int | None,
        typer.Option(metavar="ID", help="The first sentinel id.", show_default="the tokenizer's", **_panel),
    ] = None,
    token_cap: Annotated[
        float,
        typer.Option(
            min=0.0, help="Tokens that may calibrate an expert, in even shares of all tokens.", **_panel
        ),
    ] = 4.0,
    experts_per_group: Annotated[
        int,
        typer.Option(
            min=1,
            help="Experts quantized and written together. Memory: about 12 x d_ff² bytes for each of them.",
            **_panel,
        ),
    ] = 16,
    codebook: Annotated[
        str,
        typer.Option(
            help="Of ternary digits: tunstall-N (codewords of N bits, 2 to 16, fitted to the model), or upstream.",
            **_panel,
        ),
    ] = "tunstall-8",
    level_dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="What the levels are stored as.", **_panel)
    ] = "bfloat16",
) -> Answer:
    """Compress a checkpoint's experts into an artifact.

    Layer by layer, a group of experts at a time: calibrate, quantize, code,
    write. A finished group is safe on the disk: after Ctrl-C or a power cut
    the same command goes on from there, and ends with the same bytes. The
    tokenizer's model is put into the artifact.

    Examples:
      $ qmoe compress experiments/switch_mini mini-ternary \\
          --calibration experiments/switch_mini/calibration.jsonl.xz --segment 127
      $ qmoe compress switch-base-128 base-ternary --calibration c4.json.gz
      $ qmoe compress switch-base-128 base-2bit --bits 2 --group-size 128 \\
          --calibration c4.json.gz --samples 20000
    """
    import qmoe_jax as qj

    rules = SampleRules(samples, max_tokens, segment, split, seed)
    with working(f"reading {path} and the text"):
        reader = qj.open_checkpoint(path)
        pieces = open_tokenizer(path, tokenizer, extra_ids)
        check_vocabulary(pieces, reader.config.vocab_size)
        config = qj.CompressionConfig(
            bits=BITS[bits],
            method=method,
            damping=damping,
            group_size=group_size,
            activation_order=activation_order,
            true_sequential=true_sequential,
            skip=skip,
            keep_sentinels=keep_sentinels,
            sentinel_start=pieces.sentinels.start if sentinel_start is None else sentinel_start,
            token_cap=token_cap,
            experts_per_group=experts_per_group,
            codebook=codebook,
            level_dtype=level_dtype,
        )
        examples = read_samples(calibration, pieces, rules)
    tokens = sum(len(encoder) + len(decoder) for encoder, decoder in examples)
    note(f"{len(examples):,} calibration samples of {tokens:,} tokens; tokenizer {pieces.path}")
    attachments = {"tokenizer.model": pieces.path.read_bytes()}
    try:
        with qj.ProgressBar("compressing", console=stderr()) as bar:
            report = qj.compress(path, output, examples, config, attachments=attachments, progress=bar)
    except KeyboardInterrupt:
        again = shlex.join(["qmoe", *sys.argv[1:]])
        raise Interrupted(f"What is finished is safe in {output}; to go on from there:\n  {again}") from None
    return Answer(_fields(report, len(examples), tokens), (result_table(report),))


def _fields(report: CompressionReport, samples: int, tokens: int) -> dict[str, Any]:
    sizes = report.sizes
    return {
        "path": report.path,
        "bits_per_expert_parameter": sizes.bits_per_expert_parameter,
        "bits_per_parameter": sizes.bits_per_parameter,
        "compression_ratio": sizes.compression_ratio,
        "sparsity": report.sparsity,
        "sizes": sizes,
        "samples": samples,
        "tokens": tokens,
        "rounded_to_nearest": report.fallbacks,
        "under_calibrated": report.under_calibrated(),
        "seconds": report.seconds,
    }


def result_table(report: CompressionReport) -> Table:
    """What a compression came to, for people."""
    sizes = report.sizes
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify = str(report.path), "left"
    table.add_row(
        "bits", f"{sizes.bits_per_expert_parameter:.4f} an expert parameter, everything counted, on the disk"
    )
    table.add_row("", f"{sizes.bits_per_parameter:.4f} a parameter of the whole model")
    table.add_row(
        "size", f"{sizes.total_bytes:,} bytes, {sizes.compression_ratio:.1f} times smaller than bfloat16"
    )
    table.add_row("zeros", f"{report.sparsity:.1%} of the experts' weights")
    table.add_row("seconds", "unknown" if report.seconds is None else f"{report.seconds:.1f}")
    table.add_row("rounded to nearest", _fallbacks(report.fallbacks))
    table.add_row("under-calibrated", _few(report.under_calibrated()))
    return table


def _fallbacks(fallbacks: tuple[Fallback, ...]) -> Text:
    """The experts without a usable Hessian."""
    tokens = {(f.stack, f.layer, f.expert): f.calibration_tokens for f in fallbacks}
    names = [f"{stack} {layer} expert {e} ({n} tokens)" for (stack, layer, e), n in tokens.items()]
    return _named(names, "for want of calibration tokens", "none")


def _few(layers: dict[str, dict[int, int]]) -> Text:
    from qmoe_jax.artifact.report import UNDER_CALIBRATED

    names = [f"{layer} expert {e} ({n} tokens)" for layer, few in layers.items() for e, n in few.items()]
    return _named(names, f"fewer than {UNDER_CALIBRATED:.0%} of the mean number of tokens", "none")


def _named(names: list[str], reason: str, otherwise: str) -> Text:
    if not names:
        return Text(otherwise)
    more = f", and {len(names) - NAMED:,} more (--json names them)" if len(names) > NAMED else ""
    count = "1 expert" if len(names) == 1 else f"{len(names):,} experts"
    return Text(f"{count}, {reason}: {', '.join(names[:NAMED])}{more}", style="yellow")
