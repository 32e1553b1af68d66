"""Compress a Switch Transformer below one bit per parameter, and measure the loss.

    python experiments/compress_c2048.py

Expected on two cores of an AMD EPYC: 81 s, and

                        loss    bits per expert parameter
    original            3.794   16
    ternary-nearest     3.920   0.814
    ternary-gptq        3.816   0.973
    2-bit-nearest       3.821   2.072
    2-bit-gptq          3.802   2.072

The program takes switch-mini, a small trained model of c-2048's topology in the folder beside it, through
all of QMoE: open the T5X checkpoint lazily, calibrate on span-corrupted text, quantize expert by expert with
GPTQ, code, write the artifact, reload it and evaluate with the experts packed. The original and other
quantizers are evaluated on the same held-out text. The artifacts and a report go to runs/switch-mini; the
report's plots need `pip install 'qmoe-jax[plots]'`. A second run uses finished artifacts as they are, and
resumes an interrupted one.

The published model of 1.57 trillion parameters is a preset of the same program (nobody has run it yet):

    python experiments/compress_c2048.py --preset switch-c-2048 --tokenizer cc_all.32000.model \\
        --calibration c4-train.jsonl.gz --validation c4-validation.jsonl.gz
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
from qmoe_jax.data import Example, samples
from qmoe_jax.data.text_files import check_pipes, text_files
from qmoe_jax.evaluation.report import COLUMNS, calibration_notes, table_rows, write_report
from qmoe_jax.evaluation.variants import Variant

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
    variants: tuple[str, ...] = (ORIGINAL, *VARIANTS)


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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="switch-mini", help="settings to start from")
    add("--checkpoint", help="T5X or Hugging Face checkpoint, a path or URL")
    add("--tokenizer", type=Path, help="sentencepiece model; by default the one beside the checkpoint")
    add("--calibration", type=Path, help="text to calibrate on")
    add("--validation", type=Path, help="held-out text to evaluate on")
    add("--output", type=Path, help="folder for artifacts and report")
    add("--samples", type=positive, help="number of calibration samples")
    add("--validation-samples", type=positive, help="number of held-out samples")
    add("--segment", type=int, help="cut texts into segments of this many tokens")
    add("--damping", type=float, help="share of the mean of a Hessian's diagonal added to the diagonal")
    add("--experts-per-group", type=int, help="experts quantized together")
    add("--batch-size", type=int, help="batch size of the evaluation")
    add(
        "--variants", nargs="+", choices=[ORIGINAL, *VARIANTS], metavar="VARIANT",
        help=f"what to compare, of {ORIGINAL}, {', '.join(VARIANTS)}",
    )  # fmt: skip
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    settings = dataclasses.replace(PRESETS[given.pop("preset")], **given)
    if settings.calibration is None or settings.validation is None:
        parser.error("this preset needs --calibration TEXT and --validation TEXT")
    return settings


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
    output = settings.output / name
    tokenizer = qj.load_tokenizer(checkpoint, settings.tokenizer)
    config = dataclasses.replace(
        VARIANTS[name],
        damping=settings.damping,
        experts_per_group=settings.experts_per_group,
        sentinel_start=tokenizer.sentinels.start,
    )
    attachments = {"tokenizer.model": tokenizer.path.read_bytes()}
    with qj.ProgressBar(name) as progress:
        report = qj.compress(
            checkpoint, output, calibration, config, attachments=attachments, progress=progress
        )
    model, params = qj.load_compressed(output)
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


def main() -> None:
    """Compress, evaluate, report."""
    settings, began = parse_arguments(), time.monotonic()
    console = Console() if Console().is_terminal else Console(width=116)
    checkpoint = qj.open_checkpoint(settings.checkpoint)
    tokenizer = qj.load_tokenizer(checkpoint, settings.tokenizer)
    check_pipes(*map(text_files, (settings.calibration, settings.validation)))
    calibration = samples(settings.calibration, tokenizer, settings.samples, segment=settings.segment)
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


if __name__ == "__main__":
    main()
