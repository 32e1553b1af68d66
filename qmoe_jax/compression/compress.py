"""Compression end to end: what to do, in what order, and how an interrupted run continues.

Expert groups are quantized layer by layer, each on the outputs of the compressed layers before it, the
encoder's first, and each is written as soon as it is done. A run that was interrupted continues by reading
finished groups instead of quantizing them again: hidden states, experts and manifest come out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.report import CompressionReport
from qmoe_jax.artifact.store import ArtifactWriter
from qmoe_jax.checkpoints.params import nest
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.staging import staged
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.plan import fitted_codebooks, packing_kinds
from qmoe_jax.compression.resume import GroupStore
from qmoe_jax.compression.source import checkpoint_digest, examples_digest, read_dense
from qmoe_jax.compression.threads import blas_on_one_thread
from qmoe_jax.compression.walk import Walk
from qmoe_jax.data import Examples, check_examples
from qmoe_jax.parameters import expert_kernels
from qmoe_jax.progress import ProgressCallback, no_progress
from qmoe_jax.settings import own_settings


@own_settings(matmul_precision=True)
def compress(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    output: str | Path,
    examples: Examples,
    config: CompressionConfig = CompressionConfig(),  # noqa: B008 (frozen)
    *,
    attachments: Mapping[str, bytes] | None = None,
    progress: ProgressCallback = no_progress,
) -> CompressionReport:
    """Compress a checkpoint's experts into an artifact; the same call again resumes an interrupted run.

    A finished artifact is left as it is (`verify` checks its bytes).

    Memory: the parameters outside the experts as they are stored, and those of one layer in float32; the
    hidden states (in a file beyond an eighth of the machine's memory); one expert group with its Hessians,
    `experts_per_group * d_ff**2` floats, about three times. With `skip`, at the end, all expert kernels of
    that stack at once, and their compressed chunks.

    Args:
        checkpoint: a checkpoint of any dense format, by path or URL, or opened.
        output: the artifact's directory: missing, empty, or that of the same compression.
        examples: calibration samples, (encoder ids, decoder ids beginning with the start token 0).
        config: the options.
        attachments: files to carry in the artifact, by name, such as the tokenizer's model.
        progress: called with the number of experts done; a dense layer counts as one.

    Raises:
        CheckpointError: the checkpoint or the output cannot be used; nothing has been written then. Or an
            expert holds a number that is not finite, or the model overflows in a layer: both are named when
            they are reached, and the groups before them stay.
        ValueError: the examples or the options do not fit the model.
    """
    began = time.monotonic()
    reader = open_checkpoint(checkpoint)
    config.first_sentinel(reader.config)  # raises before any work
    check_examples(examples, reader.config.vocab_size)
    by_matrix = fitted_codebooks(reader, config)
    kinds = packing_kinds(config, reader.config, by_matrix)
    codebooks = {codebook.name: codebook for codebook in by_matrix.values()}
    dense, attachments = read_dense(reader), attachments or {}
    source: dict[str, Any] = {
        "checkpoint": checkpoint_digest(reader, dense),
        "examples": examples_digest(examples),
    }
    if attachments:
        source["attachments"] = {n: hashlib.sha256(b).hexdigest() for n, b in sorted(attachments.items())}
    options = dataclasses.asdict(config)
    with ArtifactWriter(
        output, config=reader.config, options=options, source=source, codebooks=codebooks.values()
    ) as writer:
        if writer.finished:
            progress(1, 1, "finished before")
            return CompressionReport.read(output)
        for name, content in attachments.items():
            writer.attach(name, content)
        compressed = {kernel.path for kernel in expert_kernels(reader.config, config.compressed_stacks)}
        skipped = [name for name in reader.names() if name not in dense.keys() | compressed]
        for name in skipped:
            reader.read_finite(name)  # raises before any work, for they are copied at the end
        with _staged_in(writer.root / ".staging", reader) as staged_reader, blas_on_one_thread():
            groups = GroupStore(staged_reader, writer, config, kinds, codebooks)
            Walk(reader.config, dense, groups, examples, config, writer.root).run(progress)
        writer.write_dense(nest(dense | {name: reader.read(name) for name in skipped}))
        writer.finish(report=groups.report(time.monotonic() - began))
        groups.exact.remove()
    return CompressionReport.read(output)


@contextlib.contextmanager
def _staged_in(scratch: Path, reader: Checkpoint) -> Iterator[Checkpoint]:
    """Yield the reader with chunks that span many experts read once, through `scratch`.

    A killed process may leave `scratch` behind.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with staged(reader, scratch) as staged_reader:
            yield staged_reader
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
