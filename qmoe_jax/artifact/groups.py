"""The file of one expert group: several experts of a layer, each one contiguous range of bytes.

A group file is safetensors. An expert's tensors `<expert>.<matrix>.<part>` lie side by side, larger elements
first, so that each is aligned where it lies; `<expert>.padding` fills up to the next expert's beginning, a
multiple of 16 bytes. The metadata name the run that the file belongs to, the packing of its matrices, and the
SHA-256 of all that and the data, so that a file can be checked on its own, before there is a manifest: it
must be exactly what its content renders to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qmoe_jax.artifact.kinds import PARTS, Kind, kind_from_json, kind_to_json
from qmoe_jax.artifact.layout import check_layout
from qmoe_jax.artifact.matrices import PackedExpertMatrix
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.reading import parse_json
from qmoe_jax.files.safetensors import ALIGNMENT, Header, TensorEntry, read_header, render_header
from qmoe_jax.files.store import File, Place, open_store

FORMAT = "qmoe-experts-1"
EXPERTS = "experts"

Expert = Mapping[str, PackedExpertMatrix]
"""The matrices of one expert: `wi` and `wo`, or `wi_0`, `wi_1` and `wo`."""


@dataclasses.dataclass(frozen=True, order=True)
class GroupKey:
    """Experts `start` to `stop - 1` of a layer of a stack ("encoder" or "decoder")."""

    stack: str
    layer: int
    start: int
    stop: int

    @property
    def path(self) -> str:
        """Path of the group's file, relative to the artifact, named after the first expert and the last."""
        name = f"experts-{self.start:05d}-{self.stop - 1:05d}.safetensors"
        return f"{EXPERTS}/{self.stack}.layers_{self.layer:02d}/{name}"

    @classmethod
    def from_path(cls, path: str) -> GroupKey | None:
        """Return the key of a relative path; None where it is not a group file."""
        pattern = rf"{EXPERTS}/(encoder|decoder)\.layers_(\d+)/experts-(\d+)-(\d+)\.safetensors"
        match = re.fullmatch(pattern, path)
        if match is None:
            return None
        key = cls(match[1], int(match[2]), int(match[3]), int(match[4]) + 1)
        return key if key.path == path else None


def render_group(key: GroupKey, experts: Sequence[Expert], run: str) -> list[bytes | memoryview]:
    """Return the bytes of a group file, in pieces; `run` is the digest of the run that the group belongs to.

    Raises:
        ValueError: the number of experts is not the key's, or they are not all packed in one way.
    """
    if len(experts) != key.stop - key.start:
        raise ValueError(f"{key.path}: expected {key.stop - key.start} experts, found {len(experts)}")
    layouts = [{name: (matrix.kind, matrix.shape) for name, matrix in expert.items()} for expert in experts]
    if any(layout != layouts[0] for layout in layouts):
        raise ValueError(f"{key.path}: expected all experts packed in one way, found {layouts}")
    tensors = list(itertools.chain.from_iterable(_expert_tensors(key.start, experts)))
    data = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for _, array in tensors]
    matrices = {
        name: {"kind": kind_to_json(kind), "shape": list(shape)} for name, (kind, shape) in layouts[0].items()
    }
    metadata = {
        "format": FORMAT,
        "group": key.path,
        "matrices": json.dumps(matrices, sort_keys=True),
        "run": run,
    }
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for piece in data:
        sha.update(piece)
    return [render_header(tensors, metadata | {"sha256": sha.hexdigest()}), *data]


def _expert_tensors(first: int, experts: Sequence[Expert]) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Yield each expert's tensors in the order of their bytes, each part in one dtype across the group."""
    parts = [
        (matrix, part) for matrix in sorted(experts[0]) for part in PARTS if part in experts[0][matrix].parts
    ]
    dtypes = {
        (matrix, part): np.result_type(*(expert[matrix].parts[part].dtype for expert in experts))
        for matrix, part in parts
    }
    parts.sort(key=lambda key: -dtypes[key].itemsize)
    for number, expert in enumerate(experts, first):
        tensors = [
            (f"{number}.{matrix}.{part}", expert[matrix].parts[part].astype(dtypes[matrix, part], copy=False))
            for matrix, part in parts
        ]
        if padding := -sum(array.nbytes for _, array in tensors) % ALIGNMENT:
            tensors.append((f"{number}.padding", np.zeros(padding, np.uint8)))
        yield tensors


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """A part that every expert of a group has; only the number of codes differs between experts."""

    matrix: str
    part: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def shape_of_view(self) -> tuple[int, ...]:
        """The shape, with -1 for the number of codes."""
        return (-1,) if self.part == "codes" else self.shape


@dataclasses.dataclass(frozen=True)
class ExpertExtent:
    """The range of bytes of one expert: one read of `nbytes` at `offset` of `file` reads all of it."""

    file: File
    offset: int
    nbytes: int
    group: GroupFile
    expert: int

    @property
    def path(self) -> Path | str:
        """The path or URL of the file."""
        return self.file.path

    def read(self) -> memoryview:
        """Read the expert's bytes. Raises `CheckpointError` where the file is missing or cut short."""
        return self.file.read_exactly(self.offset, self.nbytes)

    def parse(self, buffer: bytes | bytearray | memoryview) -> dict[str, PackedExpertMatrix]:
        """Return the expert's matrices as views of its bytes, which the caller has read."""
        return self.group.parse(self.expert, buffer)


@dataclasses.dataclass(frozen=True, eq=False)
class GroupFile:
    """The header of a group file, kept small (8 bytes per tensor), since there may be thousands of them.

    Attributes:
        file: the file.
        key: the experts in it.
        run: digest of the run that wrote it.
        matrices: kind and shape (out, in) of each matrix.
        parts: the parts of an expert, in the order of their bytes.
        data_begin: length of the header, in bytes.
        offsets: int64 `[expert, part + 2]`, the beginnings of the parts, of the padding and of the next
            expert, in bytes from the end of the header.
    """

    file: File
    key: GroupKey
    run: str
    matrices: Mapping[str, tuple[Kind, tuple[int, int]]]
    parts: tuple[StoredPart, ...]
    data_begin: int
    offsets: np.ndarray

    @classmethod
    def open(cls, root: Place, key: GroupKey, location: str | None = None) -> GroupFile:
        """Read a group file's header.

        Args:
            root: the artifact.
            key: the experts.
            location: their file, relative to `root`; `key.path` unless a manifest says otherwise.

        Raises:
            CheckpointError: the file is missing, cut short, not a group file, or of a kind unknown here.
        """
        location = location or key.path
        file = File(open_store(root), location)
        path, header = file.path, read_header(file)
        if (found := header.metadata.get("format")) != FORMAT:
            raise CheckpointError(
                "is not an expert group of this version", path=path, expected=FORMAT, found=found
            )
        if (found := header.metadata.get("group")) != location:
            raise CheckpointError("holds other experts", path=path, expected=location, found=found)
        try:
            packed = parse_json(header.metadata["matrices"])
            matrices = {
                name: (
                    kind_from_json(fields["kind"], path),
                    (int(fields["shape"][0]), int(fields["shape"][1])),
                )
                for name, fields in packed.items()
            }
            run = header.metadata["run"]
            stored, offsets = _layout(header, key)
            if {part.matrix for part in stored} != matrices.keys():
                raise ValueError(f"tensors of other matrices than {sorted(matrices)}")
            for name, (kind, shape) in matrices.items():
                of_matrix = (part for part in stored if part.matrix == name)
                check_layout(kind, shape, {part.part: (part.dtype, part.shape) for part in of_matrix})
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError("has a damaged header", path=path, found=repr(error)) from error
        return cls(file, key, run, matrices, stored, header.data_begin, offsets)

    @property
    def path(self) -> Path | str:
        """The path or URL of the file."""
        return self.file.path

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return self.data_begin + int(self.offsets[-1, -1])

    def extent(self, expert: int) -> ExpertExtent:
        """Return the range of bytes of an expert, given its number within the layer."""
        begins = self.offsets[expert - self.key.start]
        offset = self.data_begin + int(begins[0])
        return ExpertExtent(self.file, offset, int(begins[-1] - begins[0]), self, expert)

    def parse(self, expert: int, buffer: bytes | bytearray | memoryview) -> dict[str, PackedExpertMatrix]:
        """Return the matrices of an expert as views of its bytes."""
        begins = (self.offsets[expert - self.key.start] - self.offsets[expert - self.key.start, 0]).tolist()
        parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in self.matrices}
        for stored, begin, end in zip(self.parts, begins[:-2], begins[1:-1], strict=True):
            count = (end - begin) // stored.dtype.itemsize
            view = np.frombuffer(buffer, stored.dtype, count, begin)
            parts[stored.matrix][stored.part] = view.reshape(stored.shape_of_view)
        return {
            name: PackedExpertMatrix(kind, shape, parts[name])
            for name, (kind, shape) in self.matrices.items()
        }

    def read(self, start: int, stop: int) -> list[dict[str, PackedExpertMatrix]]:
        """Read experts `start` to `stop - 1` at once."""
        if start >= stop:
            return []
        first, last = self.extent(start), self.extent(stop - 1)
        data = self.file.read_exactly(first.offset, last.offset + last.nbytes - first.offset)
        extents = (self.extent(expert) for expert in range(start, stop))
        return [extent.parse(data[extent.offset - first.offset :][: extent.nbytes]) for extent in extents]


def _layout(header: Header, key: GroupKey) -> tuple[tuple[StoredPart, ...], np.ndarray]:
    """Return the parts that all experts have, and `GroupFile.offsets`.

    Raises:
        ValueError: the tensors do not lie as `render_group` writes them.
    """
    by_expert: dict[int, list[TensorEntry]] = {expert: [] for expert in range(key.start, key.stop)}
    for entry in header.tensors:
        by_expert[int(entry.name.split(".")[0])].append(entry)
    layouts, offsets = set(), []
    for expert, entries in by_expert.items():
        tensors = [entry for entry in entries if entry.name != f"{expert}.padding"]
        layouts.add(tuple(map(_stored_part, tensors)))
        offsets.append([*(entry.begin for entry in tensors), tensors[-1].end, entries[-1].end])
    if len(layouts) != 1 or [row[0] for row in offsets[1:]] != [row[-1] for row in offsets[:-1]]:
        raise ValueError("experts do not lie side by side")
    return layouts.pop(), np.array(offsets, np.int64)


def _stored_part(entry: TensorEntry) -> StoredPart:
    _, matrix, part = entry.name.split(".")
    if part not in PARTS:
        raise ValueError(f"{entry.name}: unknown part")
    if part == "codes" and len(entry.shape) != 1:
        raise ValueError(f"{entry.name}: expected one axis, found {list(entry.shape)}")
    return StoredPart(matrix, part, entry.dtype, () if part == "codes" else entry.shape)
