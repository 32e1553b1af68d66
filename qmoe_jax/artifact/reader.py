"""Reading an artifact: as a checkpoint like any other, as packed matrices, or one expert by one `pread`."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float, Float32

from pallas_kernels import PackedMatrix
from qmoe_jax.artifact.codebook_file import CODEBOOKS, read_codebooks
from qmoe_jax.artifact.dense import DenseTensor
from qmoe_jax.artifact.groups import ExpertExtent, GroupFile
from qmoe_jax.artifact.kinds import Codebooks, Kind, Ternary
from qmoe_jax.artifact.manifest import GroupRecord, Manifest
from qmoe_jax.artifact.matrices import PackedExpertMatrix, dequantize
from qmoe_jax.checkpoints.reader import DenseReader
from qmoe_jax.coding import pack
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import Shard, Tensor
from qmoe_jax.parameters import ExpertKernel, expert_shapes


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertLayer:
    """The compressed experts of one layer; a group's header is read when first one of its experts is."""

    root: Path
    run: str
    groups: tuple[GroupRecord, ...]
    _opened: dict[str, GroupFile] = dataclasses.field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """How many experts the layer has."""
        return self.groups[-1].key.stop

    def extent(self, expert: int) -> ExpertExtent:
        """Where an expert lies. Raises `IndexError` where the layer has no such expert."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"no expert {expert}: the layer has {self.num_experts}")
        index = bisect.bisect_right(self.groups, expert, key=lambda group: group.key.start) - 1
        return self._open(self.groups[index]).extent(expert)

    def read(self, experts: slice) -> Iterator[dict[str, PackedExpertMatrix]]:
        """A range of experts, one read a group."""
        start, stop, _ = experts.indices(self.num_experts)
        for group in self.groups:
            begin, end = max(start, group.key.start), min(stop, group.key.stop)
            if begin < end:
                yield from self._open(group).read(begin, end)

    def files(self) -> Iterator[GroupFile]:
        """The header of every group."""
        return map(self._open, self.groups)

    def _open(self, group: GroupRecord) -> GroupFile:
        """A group's file, checked against the manifest as far as its header goes."""
        if group.path not in self._opened:
            file = GroupFile.open(self.root, group.key, group.path)
            expected, found = (group.record.bytes, self.run), (file.nbytes, file.run)
            if found != expected:
                raise CheckpointError(
                    "is not the file that the manifest lists",
                    path=file.path,
                    expected="{} bytes, run {}".format(*expected),
                    found="{} bytes, run {}".format(*found),
                    remedy="copy the artifact again",
                )
            self._opened[group.path] = file
        return self._opened[group.path]


@dataclasses.dataclass(frozen=True)
class PackedKernel:
    """One matrix of a layer's experts as a tensor [expert, in, out] in float32, dequantized as it is read."""

    layer: ExpertLayer
    matrix: str
    shape: tuple[int, ...]
    codebooks: Codebooks

    @property
    def dtype(self) -> np.dtype:
        """float32: what dequantizing gives."""
        return np.dtype(np.float32)

    def read(self, rows: slice) -> Float32[np.ndarray, "expert in out"]:
        """The experts of a range. Raises `CheckpointError` naming the expert whose codes are damaged."""
        start, stop, _ = rows.indices(self.shape[0])
        values = np.empty((max(0, stop - start), *self.shape[1:]), np.float32)
        for index, expert in enumerate(self.layer.read(rows)):
            try:
                values[index] = dequantize(expert[self.matrix], self.codebooks).T
            except ValueError as error:
                path = self.layer.extent(start + index).path
                key = f"expert {start + index}, {self.matrix}"
                raise CheckpointError("is damaged", path=path, key=key, found=str(error)) from error
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactReader(DenseReader):
    """An artifact: a `Reader` whose expert kernels come back dequantized, and more.

    Opening reads the manifest and the codebooks. Experts are read by `pread`, never mapped: a file cut short
    is an `CheckpointError` that names it, with the bytes expected and found.

    Attributes:
      manifest: what the artifact is.
      codebooks: by name.
      layers: the compressed layers, by stack ('encoder' or 'decoder') and number.
    """

    manifest: Manifest
    codebooks: Codebooks
    layers: Mapping[tuple[str, int], ExpertLayer]

    @classmethod
    def open(cls, path: str | Path) -> ArtifactReader:
        """Opens an artifact.

        Raises:
          CheckpointError: it is unfinished, damaged, or of a version or kind unknown here.
        """
        root = Path(path)
        manifest = Manifest.read(root)
        codebooks = read_codebooks(root / CODEBOOKS) if manifest.run.codebooks else {}
        found = {name: codebook.digest for name, codebook in codebooks.items()}
        if found != manifest.run.codebooks:
            expected = manifest.run.codebooks
            raise CheckpointError("is damaged", path=root / CODEBOOKS, expected=expected, found=found)
        layers = _layers(root, manifest)
        tensors: dict[str, Tensor] = {
            name: DenseTensor(root, name, record) for name, record in manifest.dense.items()
        }
        shapes = expert_shapes(manifest.run.config)
        for (stack, number), layer in layers.items():
            for matrix, (out, width) in shapes.items():
                shape = (layer.num_experts, width, out)
                name = ExpertKernel(stack, number, matrix).path
                tensors[name] = PackedKernel(layer, matrix, shape, codebooks)
        return cls(
            path=root,
            format="qmoe",
            config=manifest.run.config,
            tensors=tensors,
            list_shards=lambda: _shards(root, manifest),
            manifest=manifest,
            codebooks=codebooks,
            layers=layers,
        )

    def kind(self, name: str) -> Kind | None:
        """How an expert kernel is packed; None for a parameter that is not compressed."""
        self.shape(name)
        return self.manifest.kinds.get(name)

    def packed(self, name: str, experts: slice | None = None) -> PackedMatrix:
        """A range of the experts of a kernel as the kernels of `pallas_kernels` take them, in host memory.

        The matrices are [out, in]. A kernel that is `input_scaled` wants `input_scale` applied to x first.

        Raises:
          ValueError: the kernel is not ternary with one pair of levels a row.
        """
        kind = self.kind(name)
        if not isinstance(kind, Ternary) or kind.group_size is not None:
            raise ValueError(f"{name} is no ternary kernel with levels a row, but {kind}")
        matrices = self._matrices(name, experts)
        streams = [kind.encoded(matrix.parts) for matrix in matrices]
        levels = np.stack([matrix.parts["levels"] for matrix in matrices])
        return pack(streams, levels, self.codebooks[kind.codebook], self.shape(name)[1])

    def input_scale(self, name: str, experts: slice | None = None) -> Float[np.ndarray, "expert in"] | None:
        """The scale of each input column of a range of experts, None for a kernel that has none."""
        kind = self.kind(name)
        if kind is None or not kind.input_scaled:
            return None
        return np.stack([matrix.parts["input_scale"] for matrix in self._matrices(name, experts)])

    def expert_extent(self, stack: str, layer: int, expert: int) -> ExpertExtent:
        """Where one expert lies, all of its matrices in one contiguous range; the extent reads and parses it.

        Raises `KeyError` or `IndexError` where there is no such compressed layer or expert.
        """
        return self.layers[stack, layer].extent(expert)

    def dense_params(self, dtype: Any = None) -> dict[str, Any]:
        """Every parameter that is not compressed, as a nested dict of arrays on the default device.

        Args:
          dtype: cast to while reading; None: as stored.

        Memory: the result and one array more.
        """
        params = {}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, DenseTensor):
                array = tensor.read_as(tensor.dtype if dtype is None else np.dtype(jnp.dtype(dtype)))
                params[name] = jax.device_put(array).block_until_ready()
        return traverse_util.unflatten_dict(params, sep="/")

    def _matrices(self, name: str, experts: slice | None) -> list[PackedExpertMatrix]:
        tensor = self.tensors[name]
        assert isinstance(tensor, PackedKernel)
        return [expert[tensor.matrix] for expert in tensor.layer.read(experts or slice(None))]


def _layers(root: Path, manifest: Manifest) -> dict[tuple[str, int], ExpertLayer]:
    groups: dict[tuple[str, int], list[GroupRecord]] = {}
    for group in manifest.groups:
        groups.setdefault((group.key.stack, group.key.layer), []).append(group)
    run = manifest.run.digest
    return {layer: ExpertLayer(root, run, tuple(records)) for layer, records in groups.items()}


def _shards(root: Path, manifest: Manifest) -> list[Shard]:
    """The expert files and the codebooks, by their sizes; what they contain, `verify` looks at."""
    expected = {group.path: group.record for group in manifest.groups} | dict(manifest.files)
    shards = []
    for path, record in expected.items():
        found = (root / path).stat().st_size if (root / path).is_file() else None
        problem = (
            None if found == record.bytes else f"expected {record.bytes} bytes, found {found or 'no file'}"
        )
        shards.append(Shard(path, found, problem))
    return shards
