"""Expert groups of a run: quantized and written, or read back where an earlier run finished them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.kinds import Kind
from qmoe_jax.artifact.report import GroupReport, RunReport
from qmoe_jax.artifact.store import ArtifactWriter
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.coding import Codebook
from qmoe_jax.compression.exact import Levels, exact_values
from qmoe_jax.compression.experts import Weights, compress_group
from qmoe_jax.compression.finished import FinishedGroups, GroupRecord
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.producer import Producer, require_producer
from qmoe_jax.compression.tokens import GroupTokens
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.parameters import ExpertKernel, expert_matrices


class GroupStore:
    """The experts of one run, group by group; every group is on disk before the next one begins.

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
        self.finished = FinishedGroups(writer.store, writer.run.digest)
        self._records = {key: record for key in self._keys() if (record := self._read_record(key))}
        self._reports = self._read_reports()

    def require_same_producer(self) -> None:
        """Raise `CheckpointError` where finished groups were made by other software or another machine."""
        made = [report.producer for report in self._reports.values()]
        require_producer(self.producer, made, self.writer.store.root)

    def complete(self) -> bool:
        """Return whether every group is on disk, intact and with its figures, so that none is missing."""
        keys = list(self._keys())
        return all(key in self._reports for key in keys) and all(self._intact(key) for key in keys)

    def reads(self, stacks: Iterable[str]) -> Iterator[tuple[str, range]]:
        """Yield the kernels and experts that a walk over `stacks` will read, in its order."""
        for key in self._keys(stacks):
            if key not in self._records:
                for matrix in expert_matrices(self.reader.config):
                    yield ExpertKernel(key.stack, key.layer, matrix).path, range(key.start, key.stop)

    def original(self, stack: str, layer: int, experts: range) -> Weights:
        """Read the original matrices of a group, float32 `[expert, in, out]`."""
        part = slice(experts.start, experts.stop)
        return {
            matrix: self.reader.read_finite(ExpertKernel(stack, layer, matrix).path, part, dtype=np.float32)
            for matrix in expert_matrices(self.reader.config)
        }

    def quantized(self, stack: str, layer: int, experts: range, tokens: GroupTokens) -> Weights:
        """Return a group's quantized matrices, float32 `[expert, in, out]`, levels not rounded.

        A group that is not finished yet is quantized on `tokens` and written, its record last.
        """
        key = GroupKey(stack, layer, experts.start, experts.stop)
        levels = self._read_levels(key)
        if levels is not None and self._intact(key):
            stored = self.writer.read_group(stack, layer, experts.start, experts.stop)
            return exact_values(stored, levels, self.codebooks)
        began = time.monotonic()
        group = compress_group(
            self.original(stack, layer, experts),
            None if self.config.method == "nearest" else tokens,
            self.reader.config,
            self.config,
            self.kinds,
            self.codebooks,
            self.reader.path,
            key,
        )
        levels_record = self.finished.write_levels(key, group.levels)
        group_record = self.writer.write_group(stack, layer, experts.start, group.experts)
        report = GroupReport(
            stack,
            layer,
            experts.start,
            tokens.counts(len(experts)),
            tokens.calibration().counts(len(experts)),
            group.reports,
            time.monotonic() - began,
            self.producer,
        )
        self.finished.write(key, group_record, levels_record, report)
        self._reports[key] = report
        return group.values

    def report(self, seconds: float) -> RunReport:
        """Return the report of a run that took `seconds`."""
        groups = tuple(self._reports[key] for key in sorted(self._keys()))
        return RunReport(groups, seconds, jax.devices()[0].device_kind)

    def _keys(self, stacks: Iterable[str] | None = None) -> Iterator[GroupKey]:
        """Yield the groups of `stacks`, by default those to quantize, in the order of the walk."""
        count, size = self.reader.config.num_experts, self.config.experts_per_group
        for stack in self.config.compressed_stacks if stacks is None else stacks:
            for layer in self.reader.config.sparse_layers(stack):
                for start in range(0, count, size):
                    yield GroupKey(stack, layer, start, min(start + size, count))

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
        known = {key: places.get((key.stack, key.layer, key.start)) for key in self._keys()}
        found = {key: report for key, report in known.items() if report is not None}
        return found | {key: record.report for key, record in self._records.items()}

    def _read_levels(self, key: GroupKey) -> Levels | None:
        """Return the levels of a group that is on record; None where they are damaged."""
        if key not in self._records:
            return None
        try:
            return self.finished.read_levels(key, self._records[key])
        except CheckpointError as error:
            _warn(key, error)
            return None

    def _intact(self, key: GroupKey) -> bool:
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
