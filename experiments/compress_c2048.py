"""Compress a Switch Transformer below one bit per parameter, and measure what it costs.

    python experiments/compress_c2048.py

takes switch-mini, the small trained model of c-2048's topology that lies beside this file, through all of QMoE: open
the T5X checkpoint lazily, calibrate on span-corrupted text, quantize expert by expert with GPTQ to ternary, code, write
the artifact; reload it and evaluate with the experts packed. Beside it stand the original, rounding to nearest, and two
bits, on the same held-out text. About 3 minutes on two cores; the table, a report with plots and the artifacts are in
runs/switch-mini. Run again, finished artifacts are used as they are and a stopped one goes on.

For switch-c-2048 it is the same program:

    python experiments/compress_c2048.py --checkpoint gs://t5-data/pretrained_models/t5x/moe/switch_classic/c/e2048 \\
        --tokenizer cc_all.32000.model --calibration c4.jsonl.gz --max-tokens 568 --samples 160000 \\
        --validation c4-validation.jsonl.gz --output c2048 --variants ternary-gptq
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
from qmoe_jax.data import Example, Tokenizer, read_documents, segments, short_texts, span_corruption
from qmoe_jax.evaluation.report import COLUMNS, calibration_notes, table_rows, write_report
from qmoe_jax.evaluation.variants import Variant

MINI = Path(__file__).parent / "switch_mini"
VARIANTS = {
    "ternary-nearest": qj.CompressionConfig(bits="ternary", method="nearest"),
    "ternary-gptq": qj.CompressionConfig(bits="ternary", method="gptq"),
    "2-bit-nearest": qj.CompressionConfig(bits=2, method="nearest"),
    "2-bit-gptq": qj.CompressionConfig(bits=2, method="gptq"),
}
ORIGINAL = "original"


def parse_arguments() -> argparse.Namespace:
    """The command line; its defaults are the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", default=str(MINI), help="T5X or Hugging Face checkpoint, a path or URL"
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=MINI / "tokenizer.model", help="sentencepiece model"
    )
    parser.add_argument(
        "--calibration", type=Path, default=MINI / "calibration.jsonl.xz", help="text to calibrate on"
    )
    parser.add_argument(
        "--validation", type=Path, default=MINI / "validation.jsonl.xz", help="text to evaluate on"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/switch-mini"), help="folder for artifacts and report"
    )
    parser.add_argument("--samples", type=int, default=2000, help="calibration samples at most")
    parser.add_argument("--validation-samples", type=int, default=512, help="evaluation samples at most")
    parser.add_argument("--segment", type=int, default=127, help="cut texts into pieces of this many tokens")
    parser.add_argument(
        "--max-tokens", type=int, help="instead of cutting, skip texts longer than this (568: as QMoE)"
    )
    parser.add_argument("--damping", type=float, default=0.1, help="share of the Hessian's mean diagonal")
    parser.add_argument("--experts-per-group", type=int, default=16, help="experts quantized together")
    parser.add_argument("--batch-size", type=int, default=32, help="of the evaluation")
    parser.add_argument(
        "--variants", nargs="+", choices=[ORIGINAL, *VARIANTS], default=[ORIGINAL, *VARIANTS], metavar="VARIANT",
        help=f"which to compare, of {ORIGINAL}, {', '.join(VARIANTS)} (default: all)",
    )  # fmt: skip
    return parser.parse_args()


def read_examples(
    path: Path, tokenizer: Tokenizer, count: int, arguments: argparse.Namespace
) -> list[Example]:
    """Span-corrupted samples of a text, `count` at most."""
    documents = read_documents(path)
    if arguments.max_tokens:
        texts = short_texts(documents, tokenizer, arguments.max_tokens, count)
    else:
        texts = segments(documents, tokenizer, arguments.segment)
        texts = texts[:: max(1, -(-len(texts) // count))]  # spread over all documents
    return span_corruption(texts, tokenizer.sentinels)


def compress_variant(
    name: str, examples: list[Example], tokenizer: Tokenizer, arguments: argparse.Namespace
) -> qj.CompressionReport:
    """Compress a variant unless its artifact is there."""
    config = dataclasses.replace(
        VARIANTS[name],
        damping=arguments.damping,
        experts_per_group=arguments.experts_per_group,
        sentinel_start=tokenizer.sentinels.start,
    )
    output = arguments.output / name
    attachments = {"tokenizer.model": tokenizer.path.read_bytes()}
    with qj.ProgressBar(name) as progress:
        return qj.compress(
            arguments.checkpoint, output, examples, config, attachments=attachments, progress=progress
        )


def wide_console() -> Console:
    """The terminal, or 116 columns where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=116)


def show(variants: list[Variant], console: Console) -> None:
    """Print the table, and what to know of the calibration."""
    table = Table(
        *COLUMNS, title="held-out loss against size; sizes are measured on the disk, everything counted"
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
    arguments, console, began = parse_arguments(), wide_console(), time.monotonic()
    tokenizer = Tokenizer(arguments.tokenizer)
    reader = qj.open_checkpoint(arguments.checkpoint)
    calibration = read_examples(arguments.calibration, tokenizer, arguments.samples, arguments)
    validation = read_examples(arguments.validation, tokenizer, arguments.validation_samples, arguments)
    tokens = sum(len(encoder) for encoder, _ in calibration)
    console.print(
        f"{arguments.checkpoint}: {reader.config.num_experts} experts in "
        f"{len(reader.config.encoder_sparse_layers)} + {len(reader.config.decoder_sparse_layers)} layers, "
        f"{reader.config.expert_parameters:,} expert parameters; {len(calibration):,} calibration samples "
        f"({tokens:,} encoder tokens), {len(validation):,} held out",
        soft_wrap=True,
    )
    variants = []
    for name in arguments.variants:
        if name == ORIGINAL:
            model, params = qj.load_model(arguments.checkpoint)
            evaluation = qj.evaluate(model, params, validation, batch_size=arguments.batch_size)
            variants.append(Variant(name, evaluation))
            continue
        report = compress_variant(name, calibration, tokenizer, arguments)
        model, params = qj.load_compressed(report.path)
        evaluation = qj.evaluate(model, params, validation, batch_size=arguments.batch_size)
        variants.append(Variant(name, evaluation, report))
    show(variants, console)
    facts = {
        "checkpoint": arguments.checkpoint,
        "calibration samples": len(calibration),
        "held-out samples": len(validation),
        "held-out tokens": variants[0].evaluation.tokens,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(["python", *sys.argv]),
    }
    write_report(arguments.output / "report", variants, facts)
    console.print(
        f"report: {arguments.output / 'report' / 'report.md'}; {time.monotonic() - began:.0f} s in all"
    )


if __name__ == "__main__":
    main()
