"""Compression end to end: what to do, in what order, and how an interrupted run continues.

Expert groups are quantized layer by layer, each on the outputs of the compressed layers before it, the
encoder's first, and each is written as soon as it is done. A run that was interrupted continues by reading
finished groups instead of quantizing them again: hidden states, experts and manifest come out the same.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.report import CompressionReport
from qmoe_jax.artifact.store import ArtifactWriter, artifact_directory
from qmoe_jax.artifact.verify import damaged_files
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.staging import StagingStatistics, staged
from qmoe_jax.coding import Codebook
from qmoe_jax.compression.finished import remove_records
from qmoe_jax.compression.kept import write_kept
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.packing import fitted_codebooks, packing_kinds
from qmoe_jax.compression.passes.walk import Walk
from qmoe_jax.compression.planning.costs import ExpertStorage, Kind, TokenCounts
from qmoe_jax.compression.planning.rates import nominal_rates
from qmoe_jax.compression.planning.resources import require_resources
from qmoe_jax.compression.planning.work import KEPT, Work, WorkTally
from qmoe_jax.compression.producer import this_producer
from qmoe_jax.compression.resume import GroupStore
from qmoe_jax.compression.scratch import FOLDER as SCRATCH
from qmoe_jax.compression.scratch import Scratch
from qmoe_jax.compression.source import source_digests
from qmoe_jax.compression.threads import blas_on_one_thread
from qmoe_jax.data import Examples, checked_examples
from qmoe_jax.distributed import Hosts, device_mesh
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.output import output_directory
from qmoe_jax.parameters import expert_kernels
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
    allow_mixed: bool = False,
    scratch: str | os.PathLike[str] | None = None,
    devices: int | None = None,
    progress: ProgressCallback = no_progress,
) -> CompressionReport:
    """Compress a checkpoint's experts into an artifact; the same call again resumes an interrupted run.

    Of a finished artifact the checksums are checked. Files that are damaged or missing, of a finished or an
    interrupted run, are made again, after a warning that names them.

    The experts are divided among the devices of this process. With several processes (hosts), each joined by
    `jax.distributed.initialize` before, all call this with the same arguments and share the work; if one
    dies, start them again, in any number. The bytes are the same for any number of devices and hosts.

    Memory: the parameters of one layer outside its experts in float32; slabs of hidden states of 128 MiB, a
    few at a time; per token 7 bytes; and on every device one expert group with its Hessians,
    `experts_per_group * (d_model**2 + 3 * d_ff**2)` floats. Disk: see `scratch`.

    Args:
        checkpoint: a checkpoint of any dense format, by path or URL, or opened.
        output: the artifact's directory or URL (gs://, s3://): missing, empty, or that of the same
            compression.
        examples: calibration samples, (encoder ids, decoder ids beginning with the model's start token).
            Padding at the encoder's end does not count.
        config: the options.
        attachments: files to carry in the artifact, by name, such as the tokenizer's model.
        allow_mixed: resume a run that other software or another machine began. Each digit may then differ
            from what either of them alone gives; the report says which groups come from which.
        scratch: folder for the hidden states between layers, twice `4 * d_model` bytes per token, and for
            staged experts. By default inside the artifact, so it is required where that is at a URL; with
            several hosts on a file system that all of them share.
        devices: number of this process's devices to use; by default all of them.
        progress: called with units of work.

    Raises:
        CheckpointError: the checkpoint or the output cannot be used, or finished groups come from other
            software or another machine; nothing has been written then. Or an expert holds a number that is
            not finite, or the model overflows in a layer: both are named when they are reached, and the
            groups before them stay.
        ValueError: the examples or the options do not fit the model.
    """
    began, hosts, mesh = time.monotonic(), Hosts.current(), device_mesh(devices)
    inputs = (checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint,)
    output = artifact_directory(output, inputs=inputs)
    if isinstance(output, str) and scratch is None:
        raise CheckpointError(
            "a compression to a URL needs a local folder for its scratch files",
            path=output,
            remedy="name one (scratch, --scratch) on a disk with room for the hidden states",
        )
    folder = Path(output) / SCRATCH if scratch is None else output_directory(scratch, inputs=inputs)
    reader = open_checkpoint(checkpoint)
    config.first_sentinel(reader.config)  # raises before any work
    selection = config.selection(reader.config)
    examples = checked_examples(examples, reader.config)
    by_matrix = fitted_codebooks(reader, config)
    kinds = packing_kinds(config, reader.config, by_matrix)
    codebooks = {codebook.name: codebook for codebook in by_matrix.values()}
    attachments = attachments or {}
    source = source_digests(reader, examples, attachments, selection)
    with _writer(hosts, output, reader, config, source, list(codebooks.values())) as writer:
        if writer.finished:
            if scratch is None:
                shutil.rmtree(folder, ignore_errors=True)
            if not (damaged := damaged_files(writer.store)):
                remove_records(writer.store)
                progress(1, 1, "finished before")
                return CompressionReport.read(output)
            warnings.warn("\n".join([f"{output}: makes damaged files again", *damaged]), stacklevel=2)
        for name, content in attachments.items():
            writer.attach(name, content)
        compressed = {kernel.path for kernel in expert_kernels(reader.config, config.compressed_stacks)}
        producer = this_producer()
        place = Scratch.of(folder, writer.run.digest, producer, hosts)
        groups = GroupStore(reader, writer, config, kinds, codebooks, producer)
        kept = [name for name in reader.names() if name not in compressed] if hosts.first else []
        complete, times = place.agreed("complete", lambda: int(groups.complete())), {}
        if complete:
            progress(0, 1, "all groups were finished before")
            if hosts.first:
                write_kept(writer, reader, kept, place.staging, lambda _: None)
            progress(1, 1, "all groups were finished before")
        else:
            if not allow_mixed:
                groups.require_same_producer()
            local = output if isinstance(output, Path) else None
            tokens = TokenCounts.of(examples)
            require_resources(reader, config, tokens, output=local, scratch=folder, devices=mesh.size)
            walk = Walk(reader, groups, examples, config, place, mesh, hosts)
            tally = WorkTally(_work(walk, kept), progress)
            if hosts.first:
                tally.begin(KEPT)
                write_kept(writer, reader, kept, place.staging, partial(tally.advance, Kind.COPY))
            times = _run(walk, tally)
        if hosts.first:
            writer.finish(report=groups.report(time.monotonic() - began, times))
            remove_records(writer.store)
            place.clear()
            if scratch is None:
                shutil.rmtree(folder, ignore_errors=True)
        hosts.barrier("finished")
    return CompressionReport.read(output)


def _work(walk: Walk, kept: Sequence[str]) -> Work:
    """Return what is left to do for this host, the parameters that it copies among them."""
    reader = walk.reader
    copied = sum(math.prod(reader.shape(name)) * reader.dtype(name).itemsize for name in kept)
    work = Work.of(
        reader.config, walk.config, TokenCounts.of(walk.examples), nominal_rates(),
        storage=ExpertStorage.of(reader), copied_bytes=copied, devices=walk.mesh.size,
        hosts=walk.hosts.count,
    )  # fmt: skip
    return work.remaining(walk.shares_done())


def _run(walk: Walk, tally: WorkTally) -> dict[str, dict[str, float]]:
    """Quantize the groups that are missing, and return the times of the stages as the report has them."""
    staging = StagingStatistics()
    with (
        staged(walk.reader, walk.scratch.staging, walk.reads(), staging) as walk.groups.reader,
        blas_on_one_thread(),
    ):
        walk.run(tally)
        tally.end()
    figures = {"needed": staging.needed_bytes, "read": staging.read_bytes}
    times = {stage.name: stage.times() for stage in walk.stages.values()}
    waited = staging.waiting_seconds  # by those that read the blocks
    return times | {"staging": {"busy": staging.staging_seconds, "readers waited": waited, **figures}}


def _writer(
    hosts: Hosts,
    output: Path | str,
    reader: Checkpoint,
    config: CompressionConfig,
    source: Mapping[str, Any],
    codebooks: Sequence[Codebook],
) -> ArtifactWriter:
    """Return this host's writer of the artifact, which the first host begins."""
    if not hosts.first:
        hosts.barrier("begun")
    writer = ArtifactWriter(
        output, config=reader.config, options=config.to_json(), source=source, codebooks=codebooks,
        host=hosts.index,
    )  # fmt: skip
    if hosts.first:
        hosts.barrier("begun")
    return writer
