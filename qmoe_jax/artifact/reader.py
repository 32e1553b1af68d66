"""Reading of an artifact: as a checkpoint like any other, as packed matrices, or one expert per `pread`."""

from __future__ import annotations

import bisect
import collections
import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32

from pallas_kernels import PackedMatrix
from qmoe_jax.artifact.codebook_file import CODEBOOKS, read_codebooks
from qmoe_jax.artifact.dense import dense_tensor
from qmoe_jax.artifact.groups import ExpertExtent, GroupFile
from qmoe_jax.artifact.kinds import Codebooks, Kind, runs_packed
from qmoe_jax.artifact.manifest import GroupRecord, Manifest
from qmoe_jax.artifact.matrices import PackedExpertMatrix, check_levels, dequantize
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.coding import pack
from qmoe_jax.files.durable import FileRecord
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.foreign import HEAD_BYTES, recognize
from qmoe_jax.files.store import File, Place, Store, open_store
from qmoe_jax.files.tensor import LazyTensor, Shard, Tensor
from qmoe_jax.parameters import ExpertKernel, expert_shapes

_AHEAD = 4
"""Groups that are read while one is used: an object store answers late, but several at a time."""

_THREADS = 8
"""Threads that ask for the sizes of files: an object store answers several at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertLayer:
    """The compressed experts of one layer; a group's header is read with the first of its experts.

    Attributes:
        store: the artifact.
        run: digest of the run that wrote it.
        groups: of the layer, sorted.
        matrices: kind and shape (out, in) of each matrix, by the manifest.
    """

    store: Store
    run: str
    groups: tuple[GroupRecord, ...]
    matrices: Mapping[str, tuple[Kind, tuple[int, int]]]
    _opened: dict[str, GroupFile] = dataclasses.field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.groups[-1].key.stop

    def extent(self, expert: int) -> ExpertExtent:
        """Return the location of an expert. Raises `IndexError` where the layer has no such expert."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"no expert {expert}: the layer has {self.num_experts}")
        index = bisect.bisect_right(self.groups, expert, key=lambda group: group.key.start) - 1
        return self._open(self.groups[index]).extent(expert)

    def read(self, experts: slice) -> Iterator[dict[str, PackedExpertMatrix]]:
        """Yield a range of experts, with one read per group, the next `_AHEAD` groups read meanwhile.

        Memory: these groups as they are stored.

        Raises:
            CheckpointError: a file is missing, cut short or another one, or a level is not finite.
        """
        start, stop, _ = experts.indices(self.num_experts)
        reading: collections.deque[tuple[int, Future[list[dict[str, PackedExpertMatrix]]]]]
        reading = collections.deque()
        with ThreadPoolExecutor(_AHEAD) as pool:
            for group in self.groups:
                begin, end = max(start, group.key.start), min(stop, group.key.stop)
                if begin < end:
                    reading.append((begin, pool.submit(self._read_group, group, begin, end)))
                if len(reading) > _AHEAD:
                    yield from self._checked(*reading.popleft())
            while reading:
                yield from self._checked(*reading.popleft())

    def _read_group(self, group: GroupRecord, begin: int, end: int) -> list[dict[str, PackedExpertMatrix]]:
        return self._open(group).read(begin, end)

    def _checked(
        self, begin: int, reading: Future[list[dict[str, PackedExpertMatrix]]]
    ) -> Iterator[dict[str, PackedExpertMatrix]]:
        """Yield the experts from `begin` on that were read, their levels checked."""
        for number, expert in enumerate(reading.result(), begin):
            for name, matrix in expert.items():
                try:
                    check_levels(matrix)
                except ValueError as error:
                    path, key = self.extent(number).path, f"expert {number}, {name}"
                    raise CheckpointError("is damaged", path=path, key=key, found=str(error)) from error
            yield expert

    def files(self) -> Iterator[GroupFile]:
        """Yield the file of every group."""
        return map(self._open, self.groups)

    def _open(self, group: GroupRecord) -> GroupFile:
        """Open a group's file and check its header against the manifest."""
        if group.path not in self._opened:
            file = GroupFile.open(self.store, group.key, group.path)
            expected, found = (group.record.bytes, self.run), (file.nbytes, file.run)
            if found != expected:
                raise CheckpointError(
                    "is not the file that the manifest lists",
                    path=file.path,
                    expected="{} bytes, run {}".format(*expected),
                    found="{} bytes, run {}".format(*found),
                    remedy="copy the artifact again",
                )
            if file.matrices != self.matrices:
                raise CheckpointError(
                    "holds other matrices than the manifest lists",
                    path=file.path,
                    expected=self.matrices,
                    found=file.matrices,
                    remedy="copy the artifact again",
                )
            self._opened[group.path] = file
        return self._opened[group.path]


def expert_tensor(
    layer: ExpertLayer, matrix: str, shape: tuple[int, int], codebooks: Codebooks
) -> LazyTensor:
    """Return a matrix of a layer's experts as a float32 tensor [expert, in, out], dequantized as it is read.

    Args:
        layer: the experts.
        matrix: name of the matrix.
        shape: (out, in).
        codebooks: by name.
    """
    out, width = shape

    def read(rows: slice) -> Float32[np.ndarray, "expert in out"]:
        start, stop, _ = rows.indices(layer.num_experts)
        values = np.empty((max(0, stop - start), width, out), np.float32)
        for index, expert in enumerate(layer.read(rows)):
            try:
                values[index] = dequantize(expert[matrix], codebooks).T
            except ValueError as error:
                path, key = layer.extent(start + index).path, f"expert {start + index}, {matrix}"
                raise CheckpointError("is damaged", path=path, key=key, found=str(error)) from error
        return values

    return LazyTensor((layer.num_experts, width, out), np.dtype(np.float32), read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactReader(Checkpoint):
    """Artifact as a checkpoint, whose expert kernels are dequantized when read, and as packed matrices.

    Opening reads the manifest and the codebooks. Experts are read by `pread`, never mapped, or as ranges of
    objects: a file cut short is a `CheckpointError` that names it, with the bytes expected and found.

    Attributes:
        store: the files.
        manifest: the content of the manifest.
        codebooks: by name.
        layers: the compressed layers, by stack ("encoder" or "decoder") and number.
    """

    store: Store
    manifest: Manifest
    codebooks: Codebooks
    layers: Mapping[tuple[str, int], ExpertLayer]

    @classmethod
    def open(cls, path: Place) -> ArtifactReader:
        """Open an artifact.

        Raises:
            CheckpointError: it is unfinished, damaged, or of a version or kind unknown here.
        """
        store = open_store(path)
        manifest = Manifest.read(store)
        codebooks = read_codebooks(File(store, CODEBOOKS)) if manifest.run.codebooks else {}
        found = {name: codebook.digest for name, codebook in codebooks.items()}
        if found != manifest.run.codebooks:
            expected = manifest.run.codebooks
            raise CheckpointError("is damaged", path=store.path(CODEBOOKS), expected=expected, found=found)
        layers = _layers(store, manifest)
        tensors: dict[str, Tensor] = {
            name: dense_tensor(store, name, record) for name, record in manifest.dense.items()
        }
        shapes = expert_shapes(manifest.run.config)
        for (stack, number), layer in layers.items():
            for matrix, shape in shapes.items():
                tensors[ExpertKernel(stack, number, matrix).path] = expert_tensor(
                    layer, matrix, shape, codebooks
                )
        return cls(
            path=store.root,
            format="qmoe",
            config=manifest.run.config,
            tensors=tensors,
            list_shards=lambda: _shards(store, manifest),
            store=store,
            manifest=manifest,
            codebooks=codebooks,
            layers=layers,
        )

    def require_whole(self) -> None:
        """Raise `CheckpointError` where files are missing or damaged, or it is a slice of a model."""
        super().require_whole()
        options = self.manifest.run.options
        if not self.manifest.run.selection.whole:
            raise CheckpointError(
                "is a slice for rehearsal, not a model",
                path=self.path,
                expected="an artifact of all layers and experts",
                found=f"layers {options.get('layers', 'all')}, experts {options.get('experts', 'all')}",
                remedy="compress without layers and experts (--layers, --experts)",
            )

    def kind(self, name: str) -> Kind | None:
        """Return the packing of an expert kernel; None for a parameter that is not compressed."""
        self.shape(name)
        return self.manifest.kinds.get(name)

    def matrices(self, name: str, experts: slice | None = None) -> list[PackedExpertMatrix]:
        """Read a range of the experts of a compressed kernel as they are stored."""
        kernel = ExpertKernel.parse(name)
        layer = self.layers[kernel.stack, kernel.layer]
        return [expert[kernel.matrix] for expert in layer.read(experts or slice(None))]

    def packed(self, name: str, experts: slice | None = None) -> PackedMatrix:
        """Read a range of experts of a kernel into host memory, packed for the kernels of `pallas_kernels`.

        The matrices are [out, in]. Whether each row decodes to its width is not checked: `verify` does.

        Raises:
            CheckpointError: the codewords are not of the codebook's type, or fewer or more than are counted.
            ValueError: the kernel is not ternary with one pair of levels per row.
        """
        kind = self.kind(name)
        if not runs_packed(kind):
            raise ValueError(f"{name}: expected ternary weights with levels per row, found {kind}")
        matrices = self.matrices(name, experts)
        levels = np.stack([matrix.parts["levels"] for matrix in matrices])
        try:
            streams = [kind.encoded(matrix.parts) for matrix in matrices]
            return pack(streams, levels, self.codebooks[kind.codebook], self.shape(name)[1])
        except ValueError as error:
            raise CheckpointError("is damaged", path=self.path, key=name, found=error) from error

    def expert_extent(self, stack: str, layer: int, expert: int) -> ExpertExtent:
        """Return the contiguous range of bytes that has all matrices of one expert; it reads and parses them.

        Raises:
            KeyError: the layer does not exist or is not compressed.
            IndexError: the layer has no such expert.
        """
        return self.layers[stack, layer].extent(expert)


def _layers(store: Store, manifest: Manifest) -> dict[tuple[str, int], ExpertLayer]:
    groups: dict[tuple[str, int], list[GroupRecord]] = {}
    for group in manifest.groups:
        groups.setdefault((group.key.stack, group.key.layer), []).append(group)
    run, shapes = manifest.run.digest, expert_shapes(manifest.run.config)
    layers = {}
    for (stack, number), records in groups.items():
        kinds = {matrix: manifest.kinds[ExpertKernel(stack, number, matrix).path] for matrix in shapes}
        matrices = {matrix: (kinds[matrix], shape) for matrix, shape in shapes.items()}
        layers[stack, number] = ExpertLayer(store, run, tuple(records), matrices)
    return layers


def _shards(store: Store, manifest: Manifest) -> list[Shard]:
    """Return the expert files and the other listed files, checked by size; `verify` checks their content."""
    expected = {group.path: group.record for group in manifest.groups} | dict(manifest.files)
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda name: _shard(store, name, expected[name]), expected))


def _shard(store: Store, name: str, record: FileRecord) -> Shard:
    found = store.size(name, record.bytes)
    if found == record.bytes:
        return Shard(name, found)
    problem = f"expected {record.bytes} bytes, found {found or 'no file'}"
    known = recognize(File(store, name).read_exactly(0, min(found, HEAD_BYTES)).tobytes()) if found else None
    return Shard(name, found, f"{known}; {problem}" if known else problem)
