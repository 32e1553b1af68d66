"""Compress a Switch Transformer below one bit per parameter, and measure the loss.

    python experiments/compress_c2048.py

Expected on two cores of an Intel Xeon: 144 s, and

                        loss    bits per expert parameter
    original            3.794   16
    ternary-nearest     3.920   0.814
    ternary-gptq        3.817   0.973
    2-bit-nearest       3.821   2.072
    2-bit-gptq          3.801   2.072

The program takes switch-mini, a small trained model of c-2048's topology in the folder beside it, through
all of QMoE: open the T5X checkpoint lazily, calibrate on span-corrupted text, quantize expert by expert with
GPTQ, code, write the artifact, reload it and evaluate with the experts packed. The original and other
quantizers are evaluated on the same held-out text. The artifacts and a report go to runs/switch-mini; the
report's plots need `pip install 'qmoe-jax[plots]'`. A second run uses finished artifacts as they are, and
resumes an interrupted one.

The published model of 1.57 trillion parameters is a preset of the same program (nobody has run it yet):

    python experiments/compress_c2048.py --preset switch-c-2048 --tokenizer cc_all.32000.model \\
        --calibration c4-train.jsonl.gz --validation c4-validation.jsonl.gz --scratch /fast-disk

First it prints the plan (memory, disk, hours); with `--dry-run` that is all, and with `--layers 0
--experts 0-15` it rehearses on a slice. Each variant has a log beside its artifact.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

import qmoe_jax as qj
from qmoe_jax.artifact.store import artifact_directory
from qmoe_jax.cli.compress import READING, result_table
from qmoe_jax.cli.plan_table import plan_table
from qmoe_jax.cli.run_log import RunLog, log_path
from qmoe_jax.cli.samples import SampleOptions
from qmoe_jax.cli.streams import run_program
from qmoe_jax.compression.planning.work import TOTAL
from qmoe_jax.data import Example, Tokenizer, samples
from qmoe_jax.data.text_files import check_pipes, text_files
from qmoe_jax.evaluation.report import COLUMNS, REPORT_FILES, calibration_notes, table_rows, write_report
from qmoe_jax.evaluation.variants import Variant
from qmoe_jax.files.output import output_directory, output_file

MINI = Path(__file__).parent / "switch_mini"
ORIGINAL = "original"
VARIANTS = {
    "ternary-nearest": qj.CompressionConfig(bits="ternary", method="nearest"),
    "ternary-gptq": qj.CompressionConfig(bits="ternary", method="gptq"),
    "2-bit-nearest": qj.CompressionConfig(bits=2, method="nearest"),
    "2-bit-gptq": qj.CompressionConfig(bits=2, method="gptq"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run, each an option of the command line, where they are explained."""

    checkpoint: str
    tokenizer: Path | None
    calibration: Path | None
    validation: Path | None
    output: Path
    samples: int
    validation_samples: int = 512
    segment: int | None = None
    damping: float = 0.1
    experts_per_group: int = 16
    batch_size: int = 32
    allow_mixed: bool = False
    layers: str | None = None
    experts: str | None = None
    scratch: Path | None = None
    devices: int | None = None
    dry_run: bool = False
    variants: tuple[str, ...] = (ORIGINAL, *VARIANTS)
    plans: bool = False

    @property
    def evaluates(self) -> bool:
        """False for a plan, and for a rehearsal, whose artifacts are not whole models."""
        return not self.dry_run and self.layers is None and self.experts is None

    def options(self, variant: str, tokenizer: Tokenizer) -> qj.CompressionConfig:
        """Return the options of a variant's compression."""
        return dataclasses.replace(
            VARIANTS[variant],
            damping=self.damping,
            experts_per_group=self.experts_per_group,
            layers=self.layers,
            experts=self.experts,
        ).with_sentinels(tokenizer)


PRESETS = {
    "switch-mini": Settings(
        checkpoint=str(MINI),
        tokenizer=None,
        calibration=MINI / "calibration.jsonl.xz",
        validation=MINI / "validation.jsonl.xz",
        output=Path("runs/switch-mini"),
        samples=1151,  # every second segment of 127 tokens
        validation_samples=438,  # likewise
        segment=127,
    ),
    "switch-c-2048": Settings(
        checkpoint="gs://t5-data/pretrained_models/t5x/moe/switch_classic/c/e2048",
        tokenizer=None,
        calibration=None,
        validation=None,
        output=Path("runs/switch-c-2048"),
        samples=160_000,  # as in the paper
        variants=("ternary-gptq",),
        plans=True,
    ),
}


def positive(text: str) -> int:
    """Return a number of at least 1. Raises `ValueError`, which argparse reports with the option's name."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def parse_arguments() -> Settings:
    """Return the preset's settings, changed by the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="switch-mini", help="settings to start from")
    add("--checkpoint", help="T5X or Hugging Face checkpoint, a path or URL")
    add("--tokenizer", type=Path, help="sentencepiece model; by default the one beside the checkpoint")
    add("--calibration", type=Path, help="text to calibrate on")
    add("--validation", type=Path, help="held-out text to evaluate on")
    add("--output", help="folder for artifacts and report")
    add("--samples", type=positive, help="number of calibration samples")
    add("--validation-samples", type=positive, help="number of held-out samples")
    add("--segment", type=int, help="cut texts into segments of this many tokens")
    add("--damping", type=float, help="share of the mean of a Hessian's diagonal added to the diagonal")
    add("--experts-per-group", type=int, help="experts quantized together")
    add("--batch-size", type=int, help="batch size of the evaluation")
    add("--layers", help="rehearse on these layers alone, such as 0-1 or encoder:0; nothing is evaluated")
    add("--experts", help="rehearse on these experts of each layer alone, such as 0-15; likewise")
    add("--scratch", type=Path, help="folder for hidden states and staged experts, best on a fast disk")
    add("--devices", type=positive, help="number of devices to use; by default all of them")
    add("--dry-run", action="store_true", default=None, help="print the plan and write nothing")
    add(
        "--allow-mixed", action="store_true", default=None,
        help="resume runs that other software or another machine began",
    )  # fmt: skip
    add(
        "--variants", nargs="+", choices=[ORIGINAL, *VARIANTS], metavar="VARIANT",
        help=f"what to compare, of {ORIGINAL}, {', '.join(VARIANTS)}",
    )  # fmt: skip
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    settings = dataclasses.replace(PRESETS[given.pop("preset")], **given)
    if settings.calibration is None or (settings.validation is None and settings.evaluates):
        parser.error("this preset needs --calibration TEXT and --validation TEXT")
    if not settings.evaluates:
        if ORIGINAL in given.get("variants", ()):
            parser.error(f"--variants {ORIGINAL}: nothing is evaluated in a plan or a rehearsal")
        compressed = tuple(name for name in settings.variants if name != ORIGINAL)
        settings = dataclasses.replace(settings, variants=compressed)
    return settings


def make_plan(checkpoint: qj.Checkpoint, tokenizer: Tokenizer, settings: Settings) -> qj.CompressionPlan:
    """Return the plan of the compression that takes longest: one with GPTQ, if there is one."""
    compressed = [name for name in settings.variants if name != ORIGINAL]
    name = next((name for name in compressed if VARIANTS[name].method == "gptq"), compressed[0])
    options = SampleOptions(settings.samples, None, settings.segment, None, 0)
    return qj.plan(
        checkpoint,
        options.count_tokens([str(settings.calibration)], tokenizer),
        settings.options(name, tokenizer),
        output=settings.output / name,
        scratch=settings.scratch,
        devices=settings.devices,
    )


def compress_variant(
    name: str, checkpoint: qj.Checkpoint, calibration: list[Example], settings: Settings
) -> qj.CompressionReport:
    """Make an artifact, unless it is there."""
    tokenizer = qj.load_tokenizer(checkpoint, settings.tokenizer)
    config, output = settings.options(name, tokenizer), settings.output / name
    facts = {"options": config, "samples": f"{len(calibration):,}"}
    with (
        qj.ProgressBar(name, "work") as bar,
        RunLog(log_path(output, settings.scratch), facts, bar) as progress,
    ):
        progress(0, TOTAL, READING)
        return qj.compress(
            checkpoint, output, calibration, config, attachments=tokenizer.files(),
            allow_mixed=settings.allow_mixed, scratch=settings.scratch, devices=settings.devices,
            progress=progress,
        )  # fmt: skip


def run_variant(
    name: str,
    checkpoint: qj.Checkpoint,
    calibration: list[Example],
    validation: list[Example],
    settings: Settings,
) -> Variant:
    """Evaluate the original, or make an artifact (unless it is there) and evaluate that."""
    if name == ORIGINAL:
        model, params = qj.load_model(checkpoint)
        return Variant(name, qj.evaluate(model, params, validation, batch_size=settings.batch_size))
    report = compress_variant(name, checkpoint, calibration, settings)
    model, params = qj.load_compressed(settings.output / name)
    evaluation = qj.evaluate(model, params, validation, batch_size=settings.batch_size)
    return Variant(name, evaluation, report)


def show(variants: list[Variant], console: Console) -> None:
    """Print the table, and notes on the calibration."""
    table = Table(
        *COLUMNS, title="held-out loss against size; sizes are measured on disk, everything counted"
    )
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in table_rows(variants):
        table.add_row(*row)
    console.print(table)
    for variant in variants:
        for note in calibration_notes(variant.report) if variant.report else ():
            console.print(f"{variant.name}: {note}")


def check_output(settings: Settings) -> Settings:
    """Return the settings with the folder to write into, after checking that all of it can be written.

    Raises:
        CheckpointError: it cannot, or holds something else.
    """
    inputs = (settings.checkpoint,)
    output = output_directory(settings.output, inputs=inputs)
    for name in settings.variants:
        if name != ORIGINAL:
            artifact_directory(output / name, inputs=inputs)
    for name in REPORT_FILES:
        output_file(output / "report" / name)
    return dataclasses.replace(settings, output=output)


def run(settings: Settings) -> None:
    """Compress, evaluate, report."""
    settings, began = check_output(settings), time.monotonic()
    console = Console() if Console().is_terminal else Console(width=116)
    checkpoint = qj.open_checkpoint(settings.checkpoint)
    tokenizer = qj.load_tokenizer(checkpoint, settings.tokenizer)
    if (settings.plans or settings.dry_run) and set(settings.variants) != {ORIGINAL}:
        plan = make_plan(checkpoint, tokenizer, settings)
        console.print(plan_table(plan))
        plan.require_fit()
        if settings.dry_run:
            return
    texts = [path for path in (settings.calibration, settings.validation) if path is not None]
    check_pipes(*map(text_files, texts))
    calibration = samples(settings.calibration, tokenizer, settings.samples, segment=settings.segment)
    if not settings.evaluates:
        for name in settings.variants:
            console.print(result_table(compress_variant(name, checkpoint, calibration, settings)))
        return
    validation = samples(
        settings.validation, tokenizer, settings.validation_samples, segment=settings.segment
    )
    config, tokens = checkpoint.config, sum(len(encoder) for encoder, _ in calibration)
    console.print(
        f"{settings.checkpoint}: {config.num_experts} experts in "
        f"{len(config.encoder_sparse_layers)} + {len(config.decoder_sparse_layers)} layers, "
        f"{config.expert_parameters:,} expert parameters; {len(calibration):,} calibration samples "
        f"({tokens:,} encoder tokens), {len(validation):,} held out",
        soft_wrap=True,
    )
    variants = [
        run_variant(name, checkpoint, calibration, validation, settings) for name in settings.variants
    ]
    show(variants, console)
    facts = {
        "checkpoint": settings.checkpoint,
        "calibration samples": len(calibration),
        "held-out samples": len(validation),
        "held-out tokens": variants[0].evaluation.tokens,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(["python", *sys.argv]),
    }
    write_report(settings.output / "report", variants, facts)
    console.print(
        f"report: {settings.output / 'report' / 'report.md'}; {time.monotonic() - began:.0f} s in total"
    )


def main() -> None:
    """Run the program with the options of the command line."""
    run(parse_arguments())


if __name__ == "__main__":
    run_program(main)
