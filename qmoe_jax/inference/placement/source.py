"""Which experts of an artifact a store can hold, and what their codewords mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeGuard

from pallas_kernels import DecodeTable
from qmoe_jax.artifact.kinds import Kind, Ternary
from qmoe_jax.artifact.reader import ArtifactReader, ExpertLayer
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.placement.store import LayerKey
from qmoe_jax.parameters import ExpertKernel


@dataclasses.dataclass(frozen=True)
class PlacedSource:
    """The compressed layers of an artifact.

    Attributes:
      layers: where their experts lie.
      tables: what the codewords of each matrix mean.
    """

    layers: Mapping[LayerKey, ExpertLayer]
    tables: Mapping[LayerKey, Mapping[str, DecodeTable]]

    @classmethod
    def of(cls, reader: ArtifactReader) -> PlacedSource:
        """Of all compressed layers.

        Raises:
          CheckpointError: a matrix is not ternary with levels a row, which is what runs packed.
        """
        tables: dict[LayerKey, dict[str, DecodeTable]] = {}
        for name, kind in reader.manifest.kinds.items():
            if not runs_packed(kind):
                raise CheckpointError(
                    "cannot be left on the host or on disk",
                    path=reader.path,
                    key=name,
                    expected="ternary weights with levels a row",
                    found=kind,
                    remedy="load it with experts='device'",
                )
            kernel = ExpertKernel.parse(name)
            tables.setdefault((kernel.stack, kernel.layer), {})[kernel.matrix] = reader.codebooks[
                kind.codebook
            ].decode_table
        return cls(reader.layers, tables)


def runs_packed(kind: Kind | None) -> TypeGuard[Ternary]:
    """Whether the kernels take a matrix of this kind as it is: ternary, with levels a row."""
    return isinstance(kind, Ternary) and kind.group_size is None and not kind.input_scaled
