"""Compression end to end: layer by layer, expert group by expert group, each written as soon as it is done.

Encoder layers come first, then the decoder's on the encoder's compressed outputs. A layer's attention runs as it
stands; its router sends the tokens to experts; each group of experts is quantized on its own tokens, written, and
its tokens are run through what was written. So layer l is calibrated on the outputs of the compressed layers before
it, and a run that was stopped goes on by reading finished groups instead of quantizing them again: the states, the
experts and the manifest come out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.kinds import Kind
from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.sizes import measure
from qmoe_jax.artifact.store import REPORT, ArtifactWriter
from qmoe_jax.checkpoints.params import read_params
from qmoe_jax.checkpoints.reader import DenseReader, Reader
from qmoe_jax.checkpoints.staging import staged
from qmoe_jax.coding import Codebook
from qmoe_jax.compression.calibration import Example, RoutedTokens, kept_tokens
from qmoe_jax.compression.exact import ExactLevels, exact_values
from qmoe_jax.compression.experts import Tokens, Weights, compress_group, packing_kinds
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.report import CompressionReport, GroupRecord
from qmoe_jax.compression.source import checkpoint_digest, examples_digest, fitted_codebooks
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.durable import write_durably
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.blockwise.experts import run_experts
from qmoe_jax.inference.blockwise.layers import DecoderLayers, EncoderLayers
from qmoe_jax.inference.blockwise.progress import Silent, Watcher
from qmoe_jax.inference.blockwise.states import HiddenStates, plan_batches
from qmoe_jax.parameters import STACKS, ExpertKernel, expert_kernels, expert_matrices, is_expert


@dataclasses.dataclass(frozen=True)
class Job:
    """What every step of one compression shares."""

    reader: Reader
    writer: ArtifactWriter
    config: CompressionConfig
    kinds: Mapping[str, Kind]
    codebooks: Mapping[str, Codebook]
    watcher: Watcher
    records: dict[tuple[str, int, int], GroupRecord]

    @property
    def model(self) -> SwitchConfig:
        """The architecture."""
        return self.reader.config

    def groups(self) -> list[tuple[int, int]]:
        """First and end of every expert group of a layer."""
        size, experts = self.config.experts_per_group, self.model.num_experts
        return [(start, min(start + size, experts)) for start in range(0, experts, size)]

    def weights(self, stack: str, layer: int, start: int, stop: int) -> Weights:
        """The original matrices of a group, float32 `[expert, in, out]`."""
        read = lambda matrix: self.reader.read(ExpertKernel(stack, layer, matrix).path, slice(start, stop))
        return {matrix: read(matrix).astype(np.float32) for matrix in expert_matrices(self.model)}


def compress(
    path: str | Path,
    output: str | Path,
    examples: Sequence[Example],
    config: CompressionConfig = CompressionConfig(),  # noqa: B008 (frozen)
    *,
    attachments: Mapping[str, bytes] | None = None,
    progress: Watcher | None = None,
) -> CompressionReport:
    """Compress a checkpoint's experts into an artifact; the same call again goes on where it was stopped.

    An artifact that is already whole is left as it is (`verify` checks its bytes).

    Args:
      path: a checkpoint of any dense format, local or a URL.
      output: the artifact's directory: missing, empty, or this very compression's.
      examples: calibration samples, (encoder ids, decoder ids beginning with the start token 0).
      config: how.
      attachments: files to carry in the artifact, such as the tokenizer's model.
      progress: told how far it has come; `ProgressBar` draws it.

    Memory: the parameters outside the experts in float32; the hidden states (in a file beyond an eighth of the
    machine's memory); one expert group with its Hessians, `experts_per_group * d_ff**2` floats, about three times.

    Raises:
      CheckpointError: the checkpoint or the output cannot be used; nothing has been written then.
      ValueError: the examples or the options do not fit the model.
    """
    began = time.monotonic()
    reader = open_checkpoint(path)
    _check(examples, reader.config, config)
    by_matrix = fitted_codebooks(reader, config)
    kinds = packing_kinds(config, reader.config, by_matrix)
    codebooks = {codebook.name: codebook for codebook in by_matrix.values()}
    source: dict[str, Any] = {"checkpoint": checkpoint_digest(reader), "examples": examples_digest(examples)}
    if attachments:
        source["attachments"] = {n: hashlib.sha256(b).hexdigest() for n, b in sorted(attachments.items())}
    with ArtifactWriter(
        output,
        config=reader.config,
        options=dataclasses.asdict(config),
        source=source,
        codebooks=codebooks.values(),
    ) as writer:
        records = _earlier_records(writer)
        if not writer.finished:
            with _expert_by_expert(reader, writer) as staged_reader:
                job = Job(staged_reader, writer, config, kinds, codebooks, progress or Silent(), records)
                _run(job, examples, attachments or {}, began)
    groups = tuple(record for _, record in sorted(records.items()))
    return CompressionReport(Path(output), measure(output), groups, time.monotonic() - began)


@contextlib.contextmanager
def _expert_by_expert(reader: DenseReader, writer: ArtifactWriter) -> Iterator[DenseReader]:
    """The reader with chunks that span many experts read once, through a hidden folder that a kill may leave."""
    scratch = writer.root / ".staging"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with staged(reader, scratch) as staged_reader:
            yield staged_reader
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check(examples: Sequence[Example], model: SwitchConfig, config: CompressionConfig) -> None:
    """Refuse options and examples that do not fit the model, before any work."""
    config.first_sentinel(model)
    if not examples:
        raise ValueError("no calibration examples: expected at least one pair of encoder and decoder ids")
    for number, (encoder, decoder) in enumerate(examples):
        for name, ids in (("encoder", encoder), ("decoder", decoder)):
            if len(ids) == 0 or np.min(ids) < 0 or np.max(ids) >= model.vocab_size:
                found = f"{np.min(ids)} to {np.max(ids)}" if len(ids) else "no tokens"
                raise ValueError(
                    f"example {number}, {name}: expected ids of 0 to {model.vocab_size - 1}, found {found}; "
                    "is the tokenizer this model's?"
                )


def _run(job: Job, examples: Sequence[Example], attachments: Mapping[str, bytes], began: float) -> None:
    layers = sum(map(job.model.num_layers, STACKS))
    sparse = sum(len(job.model.sparse_layers(stack)) for stack in job.config.compressed_stacks)
    job.watcher.begin(layers, sparse * job.model.num_experts)
    compressed = {kernel.path for kernel in expert_kernels(job.model, job.config.compressed_stacks)}
    try:
        params = read_params(job.reader, [n for n in job.reader.names() if not is_expert(n)])
        for name, content in attachments.items():
            job.writer.attach(name, content)
        _walk(job, params, examples)
        dense: dict[str, Any] = {}
        for name in job.reader.names():
            if name not in compressed:
                *folders, leaf = name.split("/")
                node = dense
                for folder in folders:
                    node = node.setdefault(folder, {})
                node[leaf] = job.reader.read(name)
        job.writer.write_dense(dense)
        job.writer.finish(report=_report(job, time.monotonic() - began))
        ExactLevels(job.writer.root).remove()
    finally:
        job.watcher.end()


def _walk(job: Job, params: dict[str, Any], examples: Sequence[Example]) -> None:
    """Run every example through both stacks, compressing as it goes."""
    embedding = np.asarray(params["token_embedder"]["embedding"], np.float32)
    encoder, decoder = (
        HiddenStates([len(example[side]) for example in examples], job.model.d_model, job.writer.root)
        for side in (0, 1)
    )
    encoder.values[:] = embedding[np.concatenate([ids for ids, _ in examples])]
    decoder.values[:] = embedding[np.concatenate([ids for _, ids in examples])]
    encoder_layers = EncoderLayers(job.model, params["encoder"], encoder, plan_batches(encoder.lengths))
    _walk_stack(job, "encoder", encoder_layers, examples)
    encoder_layers.final_norm()
    decoder_layers = DecoderLayers(
        job.model, params["decoder"], decoder, plan_batches(decoder.lengths), encoder
    )
    _walk_stack(job, "decoder", decoder_layers, examples)


def _walk_stack(job: Job, stack: str, layers: EncoderLayers, examples: Sequence[Example]) -> None:
    keep = kept_tokens(examples, stack, job.config, job.model)
    for layer in range(job.model.num_layers(stack)):
        job.watcher.layer(stack, layer, layers.states.tokens)
        layers.attend(layer)
        if layer not in job.model.sparse_layers(stack):
            layers.feed_forward(layer)
            continue
        expert, probability = layers.route(layer)
        routed = RoutedTokens.select(expert, probability, keep, job.model.num_experts, job.config.token_cap)
        for start, stop in job.groups():
            where = routed.of_experts(start, stop)
            tokens = Tokens(
                layers.expert_inputs(layer, where), expert[where] - start, routed.calibrates[where]
            )
            if stack in job.config.compressed_stacks:
                weights = _compressed_weights(job, stack, layer, start, stop, tokens)
                job.watcher.experts(stop - start)
            else:
                weights = job.weights(stack, layer, start, stop)
            if len(where):
                outputs = run_experts(tokens.x, tokens.expert, weights, job.model)
                layers.add_experts(where, probability[where], outputs)


def _compressed_weights(job: Job, stack: str, layer: int, start: int, stop: int, tokens: Tokens) -> Weights:
    """The group's quantized matrices, `[expert, in, out]`; compressed and written first where it is not yet."""
    key, exact = GroupKey(stack, layer, start, stop), ExactLevels(job.writer.root)
    levels = exact.read(key)
    if levels is not None and job.writer.has_group(stack, layer, start, stop):
        return exact_values(job.writer.read_group(stack, layer, start, stop), levels, job.codebooks)
    began = time.monotonic()
    calibration = None if job.config.method == "nearest" else tokens
    group = compress_group(
        job.weights(stack, layer, start, stop), calibration, job.model, job.config, job.kinds, job.codebooks
    )
    exact.write(key, group.levels)
    job.writer.write_group(stack, layer, start, group.experts)
    count = lambda chosen: np.bincount(tokens.expert[chosen], minlength=stop - start).tolist()
    job.records[stack, layer, start] = GroupRecord(
        stack,
        layer,
        start,
        count(slice(None)),
        count(tokens.calibrates),
        group.records,
        time.monotonic() - began,
    )
    write_durably(job.writer.root / REPORT, [json.dumps(_report(job)).encode()])
    return group.values


def _report(job: Job, seconds: float | None = None) -> dict[str, Any]:
    """What differs from run to run, and the record of every group."""
    return {
        "seconds": seconds,
        "device": jax.devices()[0].device_kind,
        "groups": [record.to_json() for _, record in sorted(job.records.items())],
    }


def _earlier_records(writer: ArtifactWriter) -> dict[tuple[str, int, int], GroupRecord]:
    """The records of groups that a stopped run had finished.

    Raises:
      CheckpointError: the report is there, but is not one.
    """
    path = writer.root / REPORT
    if not path.exists():
        return {}
    try:
        records = [GroupRecord.from_json(fields) for fields in json.loads(path.read_bytes())["groups"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("is damaged", path=path, found=str(error), remedy="remove it") from error
    return {(record.stack, record.layer, record.start): record for record in records}
