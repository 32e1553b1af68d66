"""Size of an artifact on disk, everything counted."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping

from qmoe_jax.artifact.codebook_file import CODEBOOKS
from qmoe_jax.artifact.dense import DENSE
from qmoe_jax.artifact.groups import GroupFile
from qmoe_jax.artifact.manifest import REPORT
from qmoe_jax.artifact.reader import ArtifactReader
from qmoe_jax.artifact.sums import SUMS, listed_files
from qmoe_jax.files.store import Place, Store, open_store
from qmoe_jax.parameters import expert_shapes

OVERHEAD = "headers and padding"
BFLOAT16_BITS = 16
"""Bits per parameter of the model that sizes are compared with."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes on disk, and the parameters that they hold.

    Attributes:
        expert_parameters: number of parameters in compressed experts.
        other_parameters: number of all others, uncompressed layers among them.
        expert_parts: bytes of the expert files by part (codes, counts, levels, ...), and of headers and
            padding.
        codebook_bytes: size of the codebooks' file.
        dense_bytes: size of the Orbax checkpoint.
        other_bytes: size of manifest, checksums and attached files; not of the report, which is not needed to
            run the model.
    """

    expert_parameters: int
    other_parameters: int
    expert_parts: Mapping[str, int]
    codebook_bytes: int
    dense_bytes: int
    other_bytes: int

    @property
    def expert_bytes(self) -> int:
        """Size of the expert files and the codebooks."""
        return sum(self.expert_parts.values()) + self.codebook_bytes

    @property
    def total_bytes(self) -> int:
        """Size of the artifact without its report."""
        return self.expert_bytes + self.dense_bytes + self.other_bytes

    @property
    def bits_per_expert_parameter(self) -> float:
        """Bits with headers, padding and codebooks; 0 where nothing is compressed."""
        return 8 * self.expert_bytes / self.expert_parameters if self.expert_parameters else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the whole model, everything counted."""
        return 8 * self.total_bytes / (self.expert_parameters + self.other_parameters)

    @property
    def compression_ratio(self) -> float:
        """Size of all parameters in bfloat16 as a multiple of the artifact's."""
        return BFLOAT16_BITS / self.bits_per_parameter


def measure(path: Place) -> Sizes:
    """Measure an artifact's files. Raises `CheckpointError` as opening it does."""
    store = open_store(path)
    reader = ArtifactReader.open(store)
    known = {group.path: group.record for group in reader.manifest.groups} | dict(reader.manifest.files)
    size = {
        name: store.size(name, known[name].bytes if name in known else None) or 0
        for name in [*listed_files(store), SUMS]
        if name != REPORT
    }
    experts = {group.path for group in reader.manifest.groups}
    dense = {name for name in size if name.startswith(f"{DENSE}/")}
    others = size.keys() - experts - dense - {CODEBOOKS}
    compressed = {name for name in reader.names() if reader.kind(name) is not None}
    parameters = sum(math.prod(shape) for shape in expert_shapes(reader.config).values())
    return Sizes(
        expert_parameters=sum(
            (group.key.stop - group.key.start) * parameters for group in reader.manifest.groups
        ),
        other_parameters=sum(
            math.prod(reader.shape(name)) for name in reader.names() if name not in compressed
        ),
        expert_parts=_expert_parts(store, reader),
        codebook_bytes=size.get(CODEBOOKS, 0),
        dense_bytes=sum(size[name] for name in dense),
        other_bytes=sum(size[name] for name in others),
    )


def _expert_parts(store: Store, reader: ArtifactReader) -> dict[str, int]:
    """Return the bytes of all expert files by part, from their headers."""
    parts: collections.Counter[str] = collections.Counter()
    for record in reader.manifest.groups:
        group = GroupFile.open(store, record.key, record.path)
        lengths = (group.offsets[:, 1:-1] - group.offsets[:, :-2]).sum(0)
        for stored, length in zip(group.parts, lengths.tolist(), strict=True):
            parts[stored.part] += length
        parts[OVERHEAD] += group.nbytes - int(lengths.sum())
    return dict(parts)
