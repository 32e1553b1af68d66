"""qmoe compress: compresses a checkpoint's experts below one bit per parameter."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

import qmoe_jax as qj
from pallas_kernels.availability import default_platform
from pallas_kernels.cpu.ffi import raise_interrupts
from qmoe_jax.artifact.report import UNDER_CALIBRATED, Fallback
from qmoe_jax.artifact.store import artifact_directory
from qmoe_jax.cli.command import Answer
from qmoe_jax.cli.config_options import config_options
from qmoe_jax.cli.console import note, stderr, warnings_shown, working
from qmoe_jax.cli.failures import FAILED, OK, describe, message
from qmoe_jax.cli.hosts import Distributed, join_hosts, of_host
from qmoe_jax.cli.models import CheckpointPath, open_model
from qmoe_jax.cli.plan_table import plan_table
from qmoe_jax.cli.run_log import RunLog, log_path
from qmoe_jax.cli.samples import (
    TEXT,
    ExtraIds,
    MaxTokens,
    SampleOptions,
    Seed,
    Segment,
    Split,
    TokenizerFile,
    load_tokenizer,
)
from qmoe_jax.compression.planning.rates import PRESETS
from qmoe_jax.compression.planning.work import TOTAL

READING = "reading the checkpoint"
"""The label until work is counted: a minute or more for large models, whose experts are digested."""

NAMED = 8
"""Number of experts that a line of the table names; --json names them all."""


@config_options(qj.CompressionConfig, "Quantization")
def compress(
    path: CheckpointPath,
    output: Annotated[
        str,
        typer.Argument(
            help="Directory of the artifact: new, or that of an interrupted run, which is resumed.",
            show_default=False,
        ),
    ],
    calibration: Annotated[
        list[str],
        typer.Option(
            metavar="PATH",
            help=f"Calibration text: {TEXT}. Can be repeated.",
            show_default=False,
            rich_help_panel="Text",
        ),
    ],
    *,
    tokenizer: TokenizerFile = None,
    extra_ids: ExtraIds = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of calibration samples. QMoE used 10,000 for 128 experts per layer and 160,000 for "
            "2,048.",
            show_default="10,000, or all where there are fewer",
            rich_help_panel="Text",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    segment: Segment = None,
    split: Split = None,
    seed: Seed = 0,
    allow_mixed: Annotated[
        bool,
        typer.Option(
            "--allow-mixed",
            help="Resume a run that other software or another machine began: groups of both then differ in "
            "their digits, and the report says which come from which.",
        ),
    ] = False,
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Folder for hidden states and staged experts, best on a fast local disk; for several hosts "
            "on one that all of them see. --dry-run tells its size.",
            show_default="in OUTPUT",
            rich_help_panel="Machine",
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of devices to use on each host.",
            show_default="all of them",
            rich_help_panel="Machine",
        ),
    ] = None,
    distributed: Distributed = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Measure this machine shortly, print what the compression needs and how long it takes, and "
            "write nothing.",
            rich_help_panel="Plan",
        ),
    ] = False,
    hosts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --dry-run: plan for so many hosts.",
            show_default=False,
            rich_help_panel="Plan",
        ),
    ] = None,
    assume: Annotated[
        Literal["h100"] | None,
        typer.Option(
            help="With --dry-run: plan for another machine, from stated rates, instead of this one.",
            show_default=False,
            rich_help_panel="Plan",
        ),
    ] = None,
    config: qj.CompressionConfig,
) -> Answer:
    """Compress a checkpoint's experts into an artifact.

    Layer by layer, one group of experts at a time, the experts are calibrated,
    quantized, coded and written. A finished group is safe on disk: after
    Ctrl-C or a power failure the same command resumes there, and gives the
    same bytes. The tokenizer's model is stored in the artifact. OUTPUT.log beside
    it tells the course of the run, a line per layer and minute.

    Examples:
        $ qmoe compress experiments/switch_mini mini-ternary \\
                --calibration experiments/switch_mini/calibration.jsonl.xz --segment 127
        $ qmoe compress switch-base-128 base-ternary --calibration c4.json.gz
        $ qmoe compress switch-base-128 base-ternary --calibration c4.json.gz --dry-run
        $ qmoe compress switch-base-128 base-2bit --bits 2 --group-size 128 \\
                --calibration c4.json.gz --samples 20000
    """
    artifact_directory(output, inputs=(path,))  # raises before anything is read
    join_hosts(distributed)
    if not dry_run and (hosts or assume):
        raise typer.BadParameter("--hosts and --assume are for plans: give --dry-run too")
    options = SampleOptions(samples, max_tokens, segment, split, seed, at_most=10_000)
    default_platform()  # refuses one that jax cannot start before the text is read
    with working(f"reading {path} and the text"):
        checkpoint = open_model(path)
        pieces = load_tokenizer(checkpoint, tokenizer, extra_ids)
        config = config.with_sentinels(pieces)
        if dry_run:
            counts = options.count_tokens(calibration, pieces)
            rates = None if assume is None else PRESETS[assume]
            return plan_answer(
                qj.plan(
                    checkpoint, counts, config,
                    output=output, scratch=scratch, devices=devices, hosts=hosts or 1, rates=rates,
                )
            )  # fmt: skip
        examples = options.read(calibration, pieces)
    tokens = sum(len(encoder) + len(decoder) for encoder, decoder in examples)
    note(f"{len(examples):,} calibration samples of {tokens:,} tokens; tokenizer {pieces.path}")
    attachments = pieces.files()
    try:
        facts = {"options": config, "samples": f"{len(examples):,} of {tokens:,} tokens"}
        with (
            raise_interrupts(),
            warnings_shown(),
            qj.ProgressBar("compressing", "work") as bar,
            RunLog(of_host(log_path(output, scratch)), facts, bar) as progress,
        ):
            progress(0, TOTAL, READING)
            report = qj.compress(
                checkpoint,
                output,
                examples,
                config,
                attachments=attachments,
                allow_mixed=allow_mixed,
                scratch=scratch,
                devices=devices,
                progress=progress,
            )
    except KeyboardInterrupt as interrupt:
        again = shlex.join(["qmoe", *sys.argv[1:]])
        raise type(interrupt)(f"Finished groups are safe in {output}; to resume:\n  {again}") from None
    return Answer(_fields(report, len(examples), tokens), (result_table(report),))


def plan_answer(plan: qj.CompressionPlan) -> Answer:
    """Return a plan as an answer, and print what does not fit to standard error."""
    for problem in plan.problems:
        stderr().print(message(describe(problem)), style="red", soft_wrap=True)
    return Answer(plan.to_json(), (plan_table(plan),), FAILED if plan.problems else OK)


def _fields(report: qj.CompressionReport, samples: int, tokens: int) -> dict[str, Any]:
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
        "rounded_to_nearest": [{**vars(each), "reason": each.reason} for each in report.fallbacks],
        "under_calibrated": report.under_calibrated(),
        "producers": report.producers,
        "seconds": report.seconds,
    }


def result_table(report: qj.CompressionReport) -> Table:
    """Return a compression's result as a table."""
    sizes = report.sizes
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify = str(report.path), "left"
    table.add_row(
        "bits", f"{sizes.bits_per_expert_parameter:.4f} per expert parameter, everything on disk counted"
    )
    table.add_row("", f"{sizes.bits_per_parameter:.4f} per parameter of the whole model")
    table.add_row(
        "size", f"{sizes.total_bytes:,} bytes, {sizes.compression_ratio:.1f} times smaller than bfloat16"
    )
    table.add_row("sparsity", f"{report.sparsity:.1%} of the experts' weights are zero")
    table.add_row("seconds", "unknown" if report.seconds is None else f"{report.seconds:.1f}")
    if len(report.producers) > 1:
        table.add_row("made by", Text(mixed(report.producers), style="yellow"))
    table.add_row("rounded to nearest", _fallbacks(report.fallbacks))
    table.add_row("under-calibrated", _under_calibrated(report.under_calibrated()))
    return table


def mixed(producers: Sequence[Mapping[str, str]]) -> str:
    """Return in what the software and machines differ that made an artifact's groups."""
    names = sorted({name for fields in producers for name in fields})
    values = {name: [fields.get(name, "unknown") for fields in producers] for name in names}
    told = [f"{name} {' or '.join(found)}" for name, found in values.items() if len(set(found)) > 1]
    return f"{len(producers)} of them: {'; '.join(told)}"


def _fallbacks(fallbacks: tuple[Fallback, ...]) -> Text:
    """Return the experts that were rounded to nearest, one line per reason."""
    names: dict[str, dict[str, None]] = {}
    for each in fallbacks:
        name = f"{each.stack} {each.layer} expert {each.expert} ({each.calibration_tokens} tokens)"
        names.setdefault(each.reason, {})[name] = None
    return Text("\n").join(_named(list(found), reason) for reason, found in names.items()) or Text("none")


def _under_calibrated(layers: dict[str, dict[int, int]]) -> Text:
    names = [f"{layer} expert {e} ({n} tokens)" for layer, few in layers.items() for e, n in few.items()]
    return _named(names, f"fewer than {UNDER_CALIBRATED:.0%} of the mean number of tokens")


def _named(names: list[str], reason: str) -> Text:
    if not names:
        return Text("none")
    more = f", and {len(names) - NAMED:,} more (--json names them)" if len(names) > NAMED else ""
    count = "1 expert" if len(names) == 1 else f"{len(names):,} experts"
    return Text(f"{count}, {reason}: {', '.join(names[:NAMED])}{more}", style="yellow")
