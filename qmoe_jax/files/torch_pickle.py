"""Files that `torch.save` wrote, read lazily, without torch, and without executing their pickles.

Such a file is a zip archive: a pickle that describes the tensors, and one uncompressed member per storage.
The pickle may name the few globals below, which only describe; any other is refused before it is looked up.
Memory: the pickle, and the span of a storage that is read.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.foreign import foreign_error
from qmoe_jax.files.reading import read_array, unreadable

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Before a member's data: a signature, 22 bytes, the lengths of name and extra field, then these two.
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A member of the archive.

    Attributes:
        file: the archive.
        member: its name.
        dtype: of its values.
        header: offset of its zip header in the file, in bytes.
        size: number of values.
    """

    file: Path
    member: str
    dtype: np.dtype
    header: int
    size: int

    def data_offset(self) -> int:
        """Return the offset of the values in the file. Reads the header, which alone gives its own length."""
        return _data_offset(self.file, self.member, self.header)


@dataclasses.dataclass(frozen=True, slots=True)
class TorchTensor:
    """A view of a storage, as torch describes it.

    Attributes:
        key: its name in the saved dict.
        storage: what it is a view of.
        offset: of its first value, in values of the storage.
        shape: sizes of the axes.
        strides: of the axes, in values of the storage.
    """

    key: str
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The storage's dtype."""
        return self.storage.dtype

    def read(self, rows: slice) -> np.ndarray:
        """Return rows. Reads the span of the storage from their first to their last value, in one piece.

        For one expert's view of a storage that holds all experts, and for a transposed view, that is the
        tensor's own bytes and no more. Raises `CheckpointError` if the file is cut short.
        """
        shape = (rows.stop - rows.start, *self.shape[1:]) if self.shape else ()
        if not math.prod(shape):
            return np.empty(shape, self.dtype)
        start = self.offset + (rows.start * self.strides[0] if self.shape else 0)
        span = np.empty(_span(shape, self.strides), self.dtype)
        offset = self.storage.data_offset() + start * self.dtype.itemsize
        read_array(self.storage.file, offset, span, self.key)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(span, shape, strides).copy(order="C")


def open_torch(file: Path) -> dict[str, Any]:
    """Return the dict that `torch.save` saved: tensors as `TorchTensor`, other values as they are.

    Raises:
        CheckpointError: the file is not such an archive, is cut short or compressed, its pickle names a
            global that is not allowed (the error names it), or a tensor reaches beyond its storage.
    """
    archive = _Archive(file)
    try:
        saved = _Unpickler(archive).load()
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle leads the unpickler to
        raise CheckpointError(
            "the pickle is damaged", path=file, found=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(saved, dict) or not all(isinstance(key, str) for key in saved):
        raise CheckpointError(
            "does not hold a dict of tensors", path=file, expected="a state dict", found=type(saved).__name__
        )
    return {
        key: dataclasses.replace(value, key=key) if isinstance(value, TorchTensor) else value
        for key, value in saved.items()
    }


class _Archive:
    """The members of the zip archive, and where their data starts in the file."""

    def __init__(self, file: Path):
        self.file = file
        try:
            with open(file, "rb") as stream:
                start = stream.read(2)
        except OSError as error:
            raise unreadable(file, error) from error
        if start == b"\x80\x02":
            raise CheckpointError(
                "is in torch.save's old format, without a zip archive",
                path=file,
                remedy="load it in torch and save it again (torch >= 1.6 writes archives)",
            )
        try:
            with zipfile.ZipFile(file) as archive:
                self.members = {info.filename: info for info in archive.infolist()}
                pickles = [name for name in self.members if name.endswith("data.pkl")]
                self.pickle = archive.read(pickles[0]) if pickles else None
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
            known = None if start == b"PK" else foreign_error(file)
            raise known or CheckpointError(
                "is not an archive of torch.save, or is cut short",
                path=file,
                found=error,
                remedy="copy the file again",
            ) from error
        if self.pickle is None:
            raise CheckpointError(
                "is not an archive of torch.save",
                path=file,
                expected="a member data.pkl",
                found=[*self.members],
            )
        self.prefix = pickles[0].removesuffix("data.pkl")
        self._require_little_endian()

    def storage(self, key: str, dtype: np.dtype, size: int) -> Storage:
        """Return the storage `data/<key>`, which must hold `size` values uncompressed."""
        member = f"{self.prefix}data/{key}"
        info = self.members.get(member)
        if info is None:
            raise CheckpointError("a storage is missing", path=self.file, key=member)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != size * dtype.itemsize:
            raise CheckpointError(
                "a storage has another size, or is compressed",
                path=self.file,
                key=member,
                expected=f"{size * dtype.itemsize:,} bytes, uncompressed",
                found=f"{info.file_size:,} bytes, {info.compress_size:,} in the file",
            )
        return Storage(self.file, member, dtype, info.header_offset, size)

    def _require_little_endian(self) -> None:
        if info := self.members.get(f"{self.prefix}byteorder"):
            order = np.empty(info.file_size, np.uint8)
            offset = _data_offset(self.file, info.filename, info.header_offset)
            read_array(self.file, offset, order, info.filename)
            if order.tobytes() != b"little":
                raise CheckpointError(
                    "is not little-endian", path=self.file, expected=b"little", found=order.tobytes()
                )


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows only what describes tensors."""

    def __init__(self, archive: _Archive):
        super().__init__(io.BytesIO(archive.pickle or b""))
        self.archive = archive
        self.storages: dict[str, Storage] = {}
        self.allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
            **{("torch", storage): dtype for storage, dtype in STORAGES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise CheckpointError(
                "the pickle asks for something that weights do not need",
                path=self.archive.file,
                key=f"{module}.{name}",
                expected="only tensors",
                remedy="do not load this file with any program, unless you know who wrote it and why",
            )
        return self.allowed[module, name]

    def persistent_load(self, identifier: Any) -> Storage:
        kind, dtype, key, _location, size = identifier
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError(f"unknown reference {identifier!r}")
        if key not in self.storages:
            self.storages[key] = self.archive.storage(key, dtype, size)
        return self.storages[key]

    def rebuild_tensor(
        self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
    ) -> TorchTensor:
        tensor = TorchTensor("", storage, offset, tuple(shape), tuple(strides))
        end = offset + (_span(shape, strides) if math.prod(shape) else 0)
        if len(shape) != len(strides) or min((offset, *shape, *strides), default=0) < 0 or end > storage.size:
            raise CheckpointError(
                "a tensor reaches beyond its storage",
                path=storage.file,
                key=storage.member,
                expected=f"at most {storage.size:,} values",
                found=f"offset {offset}, shape {list(shape)}, strides {list(strides)}",
            )
        return tensor


def _data_offset(file: Path, member: str, header: int) -> int:
    data = np.empty(_LOCAL_HEADER.size, np.uint8)
    read_array(file, header, data, member)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(data.tobytes())
    if signature != b"PK\x03\x04":
        raise CheckpointError(
            "the archive is damaged", path=file, key=member, expected=b"PK\x03\x04", found=signature
        )
    return header + _LOCAL_HEADER.size + name_length + extra_length


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of values from the first to the last of a view that is not empty."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
