"""Compression end to end: what to do, in what order, and how an interrupted run continues.

Expert groups are quantized layer by layer, each on the outputs of the compressed layers before it, the
encoder's first, and each is written as soon as it is done. A run that was interrupted continues by reading
finished groups instead of quantizing them again: hidden states, experts and manifest come out the same.
"""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.report import CompressionReport
from qmoe_jax.artifact.store import ArtifactWriter, artifact_directory
from qmoe_jax.artifact.verify import damaged_files
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.compression.finished import remove_records
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.plan import fitted_codebooks, packing_kinds
from qmoe_jax.compression.producer import this_producer
from qmoe_jax.compression.resume import GroupStore
from qmoe_jax.compression.scratch import remove_scratch, staged_beside
from qmoe_jax.compression.source import source_digests
from qmoe_jax.compression.threads import blas_on_one_thread
from qmoe_jax.compression.walk import Walk
from qmoe_jax.data import Examples, checked_examples
from qmoe_jax.files.durable import make_folder
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.parameters import expert_kernels, is_expert
from qmoe_jax.progress import ProgressCallback, no_progress
from qmoe_jax.settings import own_settings


@own_settings(matmul_precision=True)
def compress(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    examples: Examples,
    config: CompressionConfig = CompressionConfig(),  # noqa: B008 (frozen)
    *,
    attachments: Mapping[str, bytes] | None = None,
    scratch: str | os.PathLike[str] | None = None,
    allow_mixed: bool = False,
    progress: ProgressCallback = no_progress,
) -> CompressionReport:
    """Compress a checkpoint's experts into an artifact; the same call again resumes an interrupted run.

    Of a finished artifact the checksums are checked. Files that are damaged or missing, of a finished or an
    interrupted run, are made again, after a warning that names them.

    Memory: the parameters outside the experts as they are stored, and those of one layer in float32; the
    hidden states (in a file beyond an eighth of the machine's memory); one expert group with its Hessians,
    `experts_per_group * d_ff**2` floats, about three times.

    Args:
        checkpoint: a checkpoint of any dense format, by path or URL, or opened.
        output: the artifact's directory or URL (gs://, s3://): missing, empty, or that of the same
            compression.
        examples: calibration samples, (encoder ids, decoder ids beginning with the model's start token).
            Padding at the encoder's end does not count.
        config: the options.
        attachments: files to carry in the artifact, by name, such as the tokenizer's model.
        scratch: a local folder for files that are needed meanwhile; the output's own by default, so it is
            required where that is a URL.
        allow_mixed: resume a run that other software or another machine began. Each digit may then differ
            from what either of them alone gives; the report says which groups come from which.
        progress: called with the number of experts done; a dense layer counts as one.

    Raises:
        CheckpointError: the checkpoint or the output cannot be used, or finished groups come from other
            software or another machine; nothing has been written then. Or an expert holds a number that is
            not finite, or the model overflows in a layer: both are named when they are reached, and the
            groups before them stay.
        ValueError: the examples or the options do not fit the model.
    """
    began = time.monotonic()
    inputs = (checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint,)
    output = artifact_directory(output, inputs=inputs)
    if isinstance(output, str) and scratch is None:
        raise CheckpointError(
            "a compression to a URL needs a local folder for its scratch files",
            path=output,
            remedy="name one (scratch, --scratch) on a disk with room for the hidden states",
        )
    folder = Path(scratch or output)
    reader = open_checkpoint(checkpoint)
    config.first_sentinel(reader.config)  # raises before any work
    examples = checked_examples(examples, reader.config)
    by_matrix = fitted_codebooks(reader, config)
    kinds = packing_kinds(config, reader.config, by_matrix)
    codebooks = {codebook.name: codebook for codebook in by_matrix.values()}
    dense = {name: reader.read_finite(name) for name in reader.names() if not is_expert(name)}
    attachments = attachments or {}
    source = source_digests(reader, examples, attachments)
    options = dataclasses.asdict(config)
    with ArtifactWriter(
        output, config=reader.config, options=options, source=source, codebooks=codebooks.values()
    ) as writer:
        make_folder(folder)
        remove_scratch(folder)
        if writer.finished:
            if not (damaged := damaged_files(writer.store)):
                remove_records(writer.store)
                progress(1, 1, "finished before")
                return CompressionReport.read(output)
            warnings.warn("\n".join([f"{output}: makes damaged files again", *damaged]), stacklevel=2)
        for name, content in attachments.items():
            writer.attach(name, content)
        compressed = {kernel.path for kernel in expert_kernels(reader.config, config.compressed_stacks)}
        kept = [name for name in reader.names() if name not in compressed]
        experts = [(name, range(reader.shape(name)[0])) for name in kept if is_expert(name)]
        with staged_beside(folder, reader, experts) as ahead:
            writer.write_dense({name: ahead.tensors[name] for name in kept}, source=reader.path)
        groups = GroupStore(reader, writer, config, kinds, codebooks, this_producer())
        if groups.complete():
            progress(1, 1, "all groups were finished before")
        else:
            if not allow_mixed:
                groups.require_same_producer()
            walk = Walk(reader.config, dense, groups, examples, config, folder)
            reads = groups.reads(walk.stacks)
            with staged_beside(folder, reader, reads) as groups.reader, blas_on_one_thread():
                walk.run(progress)
        writer.finish(report=groups.report(time.monotonic() - began))
        remove_records(writer.store)
    return CompressionReport.read(output)
