"""Expert groups of a run: quantized and written, or read back where an earlier run finished them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.kinds import Kind
from qmoe_jax.artifact.matrices import PackedExpertMatrix, column_groups, unpack_digits
from qmoe_jax.artifact.report import GroupReport, RunReport
from qmoe_jax.artifact.selection import expert_ranges
from qmoe_jax.artifact.store import ArtifactWriter
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.coding import Codebook
from qmoe_jax.compression.finished import FinishedGroups, GroupRecord, Levels
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.producer import Producer, require_producer
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.parameters import ExpertKernel, expert_matrices

_READERS = 8
"""Threads that read the records of finished groups: an object store answers several at a time."""

Weights = dict[str, np.ndarray]
"""Matrices of an expert group by name, float32 `[expert, in, out]` as T5X has them."""


class Stored(NamedTuple):
    """One matrix of a finished group; see `Quantized`."""

    digits: UInt8[np.ndarray, "expert out in"]
    levels: Float32[np.ndarray, "expert out group 2"]
    group_index: Int32[np.ndarray, "expert in"]


class GroupStore:
    """The experts of one run, group by group: the originals, and those that are finished.

    What an earlier run left damaged is quantized again, after a warning that names the file.
    """

    def __init__(
        self,
        reader: Checkpoint,
        writer: ArtifactWriter,
        config: CompressionConfig,
        kinds: Mapping[str, Kind],
        codebooks: Mapping[str, Codebook],
        producer: Producer,
    ):
        """Continue what `writer`'s directory holds.

        Args:
            reader: the original.
            writer: the artifact.
            config: the options.
            kinds: packing of each matrix of an expert.
            codebooks: by name.
            producer: what quantizes the groups that are missing.
        """
        self.reader, self.writer, self.config = reader, writer, config
        self.kinds, self.codebooks, self.producer = kinds, codebooks, producer
        self.selection = config.selection(reader.config)
        self.finished = FinishedGroups(writer.store, writer.run.digest)
        with ThreadPoolExecutor(_READERS) as pool:
            records = zip(self.keys(), pool.map(self._read_record, self.keys()), strict=True)
            self._records = {key: record for key, record in records if record is not None}
        self._reports = self._read_reports()

    def require_same_producer(self) -> None:
        """Raise `CheckpointError` where finished groups were made by other software or another machine."""
        made = [report.producer for report in self._reports.values()]
        require_producer(self.producer, made, self.writer.store.root)

    def complete(self) -> bool:
        """Return whether every group is done, so that none is missing."""
        self.writer.check_groups(key for key in self.keys() if key in self._reports)
        return all(map(self.done, self.keys()))

    def done(self, key: GroupKey) -> bool:
        """Return whether a group is on disk, intact and with its figures."""
        return key in self._reports and self.intact(key)

    def keys(self) -> Iterator[GroupKey]:
        """Yield the groups to quantize, in the order in which they are."""
        for stack in self.config.compressed_stacks:
            for layer in self.reader.config.sparse_layers(stack):
                if layer in self.selection.layers[stack]:
                    yield from self.keys_of(stack, layer)

    def keys_of(self, stack: str, layer: int) -> Iterator[GroupKey]:
        """Yield the groups of a layer."""
        for experts in expert_ranges(self.selection.experts, self.config.experts_per_group):
            yield GroupKey(stack, layer, experts.start, experts.stop)

    def original(self, key: GroupKey) -> Weights:
        """Read the original matrices of a group."""
        part = slice(key.start, key.stop)
        return {
            matrix: self.reader.read_finite(
                ExpertKernel(key.stack, key.layer, matrix).path, part, dtype=np.float32
            )
            for matrix in expert_matrices(self.reader.config)
        }

    def quantized(self, key: GroupKey) -> dict[str, Stored]:
        """Read the matrices of a finished group, with levels that are not rounded."""
        levels = self.finished.read_levels(key, self._records[key])
        stored = self.writer.read_group(key.stack, key.layer, key.start, key.stop)
        return {
            name: Stored(
                np.stack([unpack_digits(expert[name], self.codebooks) for expert in stored]),
                part,
                np.stack([column_groups(expert[name]) for expert in stored]),
            )
            for name, part in levels.items()
        }

    def finished_intact(self, key: GroupKey) -> bool:
        """Return whether a group is finished, its file and its levels being exactly what was written."""
        return key in self._records and self._levels_intact(key) and self.intact(key)

    def write(
        self,
        key: GroupKey,
        experts: Sequence[Mapping[str, PackedExpertMatrix]],
        levels: Levels,
        report: GroupReport,
    ) -> None:
        """Write a group, its levels before it and its record last."""
        levels_record = self.finished.write_levels(key, levels)
        group_record = self.writer.write_group(key.stack, key.layer, key.start, experts)
        self.finished.write(key, group_record, levels_record, report)
        self._records[key] = GroupRecord(self.writer.run.digest, group_record, levels_record, report)
        self._reports[key] = report

    def report(self, seconds: float, pipeline: Mapping[str, Mapping[str, float]]) -> RunReport:
        """Return the report of a run, whichever host quantized a group.

        Args:
            seconds: duration of the run.
            pipeline: see `RunReport`.
        """
        for key in self.keys():
            if key not in self._reports and (record := self._read_record(key)) is not None:
                self._reports[key] = record.report
        groups = tuple(self._reports[key] for key in sorted(self.keys()))
        return RunReport(groups, seconds, jax.devices()[0].device_kind, pipeline)

    def _read_record(self, key: GroupKey) -> GroupRecord | None:
        try:
            return self.finished.read(key)
        except CheckpointError as error:
            _warn(key, error)
            return None

    def _read_reports(self) -> dict[GroupKey, GroupReport]:
        """Return the figures of groups: of an artifact that was finished before, then those on record."""
        try:
            earlier = RunReport.read(self.writer.store).groups
        except CheckpointError as error:
            remedy = "none needed: groups whose figures are lost are quantized again"
            warnings.warn(str(error.with_remedy(remedy)), stacklevel=2)
            earlier = ()
        places = {(group.stack, group.layer, group.start): group for group in earlier}
        known = {key: places.get((key.stack, key.layer, key.start)) for key in self.keys()}
        found = {key: report for key, report in known.items() if report is not None}
        return found | {key: record.report for key, record in self._records.items()}

    def _levels_intact(self, key: GroupKey) -> bool:
        try:
            self.finished.read_levels(key, self._records[key])
        except CheckpointError as error:
            _warn(key, error)
            return False
        return True

    def intact(self, key: GroupKey) -> bool:
        """Return whether the group's file is there and exactly what it was written as."""
        record = self._records.get(key)
        try:
            if not self.writer.has_group(key.stack, key.layer, key.start, key.stop):
                if record is not None:
                    raise CheckpointError("is missing", path=self.writer.store.path(key.path))
                return False
        except CheckpointError as error:
            _warn(key, error)
            return False
        return record is None or record.group == self.writer.record(key)


def _warn(key: GroupKey, error: CheckpointError) -> None:
    """Warn that a group is quantized again because something of it is damaged."""
    experts = f"experts {key.start} to {key.stop - 1} of {key.stack} layer {key.layer}"
    warnings.warn(str(error.with_remedy(f"none needed: {experts} are quantized again")), stacklevel=2)
