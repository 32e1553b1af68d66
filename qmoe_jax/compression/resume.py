"""Expert groups of a run: quantized and written, or read back where an earlier run finished them."""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax
import numpy as np

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.kinds import Kind
from qmoe_jax.artifact.report import GroupReport, RunReport
from qmoe_jax.artifact.store import ArtifactWriter
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.coding import Codebook
from qmoe_jax.compression.exact import ExactLevels, exact_values
from qmoe_jax.compression.experts import Weights, compress_group
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.tokens import GroupTokens
from qmoe_jax.parameters import ExpertKernel, expert_matrices


class GroupStore:
    """The experts of one run, group by group; every group is on disk before the next one begins."""

    def __init__(
        self,
        reader: Checkpoint,
        writer: ArtifactWriter,
        config: CompressionConfig,
        kinds: Mapping[str, Kind],
        codebooks: Mapping[str, Codebook],
    ):
        """Continue what `writer`'s directory holds.

        Args:
            reader: the original.
            writer: the artifact.
            config: the options.
            kinds: packing of each matrix of an expert.
            codebooks: by name.

        Raises:
            CheckpointError: the report of an earlier run is damaged.
        """
        self.reader, self.writer, self.config = reader, writer, config
        self.kinds, self.codebooks = kinds, codebooks
        self.exact = ExactLevels(writer.root)
        earlier = RunReport.read(writer.root).groups
        self._reports = {(group.stack, group.layer, group.start): group for group in earlier}

    def original(self, stack: str, layer: int, experts: range) -> Weights:
        """Read the original matrices of a group, float32 `[expert, in, out]`."""
        part = slice(experts.start, experts.stop)
        return {
            matrix: self.reader.read_finite(ExpertKernel(stack, layer, matrix).path, part, dtype=np.float32)
            for matrix in expert_matrices(self.reader.config)
        }

    def quantized(self, stack: str, layer: int, experts: range, tokens: GroupTokens) -> Weights:
        """Return a group's quantized matrices, float32 `[expert, in, out]`, levels not rounded.

        A group that is not on disk yet is quantized on `tokens` and written, with its report, first.
        """
        key = GroupKey(stack, layer, experts.start, experts.stop)
        levels = self.exact.read(key)
        if levels is not None and self.writer.has_group(stack, layer, experts.start, experts.stop):
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
        self.exact.write(key, group.levels)
        self.writer.write_group(stack, layer, experts.start, group.experts)
        self._reports[stack, layer, experts.start] = GroupReport(
            stack,
            layer,
            experts.start,
            tokens.counts(len(experts)),
            tokens.calibration().counts(len(experts)),
            group.reports,
            time.monotonic() - began,
        )
        self.writer.write_report(self.report())
        return group.values

    def report(self, seconds: float | None = None) -> RunReport:
        """Return the report so far; `seconds` is the duration of a run that is done."""
        groups = tuple(report for _, report in sorted(self._reports.items()))
        return RunReport(groups, seconds, jax.devices()[0].device_kind)
