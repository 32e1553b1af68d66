"""The expert layers of an artifact that a store can hold, with their decode tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pallas_kernels import DecodeTable
from qmoe_jax.artifact.kinds import runs_packed
from qmoe_jax.artifact.reader import ArtifactReader, ExpertLayer
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.placement.store import LayerKey
from qmoe_jax.parameters import ExpertKernel


@dataclasses.dataclass(frozen=True)
class PlacedSource:
    """The compressed layers of an artifact.

    Attributes:
        layers: files and byte ranges of the experts of each layer.
        tables: decode table of each matrix of each layer.
    """

    layers: Mapping[LayerKey, ExpertLayer]
    tables: Mapping[LayerKey, Mapping[str, DecodeTable]]

    @classmethod
    def of(cls, reader: ArtifactReader) -> PlacedSource:
        """Return the source of all compressed layers of an artifact.

        Raises:
            CheckpointError: a matrix cannot run packed: it is not ternary with one pair of levels per row.
        """
        tables: dict[LayerKey, dict[str, DecodeTable]] = {}
        for name, kind in reader.manifest.kinds.items():
            if not runs_packed(kind):
                raise CheckpointError(
                    "experts cannot be kept in host memory or on disk",
                    path=reader.path,
                    key=name,
                    expected="ternary weights with one pair of levels per row",
                    found=kind,
                    remedy="load it with experts='device'",
                )
            kernel = ExpertKernel.parse(name)
            tables.setdefault((kernel.stack, kernel.layer), {})[kernel.matrix] = reader.codebooks[
                kind.codebook
            ].decode_table
        return cls(reader.layers, tables)
