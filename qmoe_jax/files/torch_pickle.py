"""Files that `torch.save` wrote, read lazily, without torch, and without executing their pickles.

Such a file is a zip archive: a pickle that describes the tensors, and one uncompressed member per storage.
The pickle may name the few globals below, which only describe; any other is refused before it is looked up.
Memory: the pickle, and the span of a storage that is read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.foreign import foreign_error
from qmoe_jax.files.inert_pickle import Global, load_inert
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
_MOST_AXES = 32
_MOST_VALUES = 2**40
"""Sizes beyond any tensor's, which NumPy refuses in other ways."""
_LONGEST_MARK = 16
"""Bytes that the member `byteorder` may have: it holds a word."""
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
        saved = load_inert(archive.pickle, _Globals(archive), _References(archive))
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
                for info in (self.members[name] for name in pickles[:1]):
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise zipfile.BadZipFile(
                            f"{info.filename} is compressed, torch.save compresses nothing"
                        )
                    if (size := file.stat().st_size) < max(info.file_size, info.compress_size):
                        raise zipfile.BadZipFile(f"{info.filename} is longer than the file of {size:,} bytes")
                self.pickle = archive.read(pickles[0]) if pickles else b""
        except Exception as error:  # whatever damaged bytes lead zipfile to
            known = None if start == b"PK" else foreign_error(file)
            raise known or CheckpointError(
                "is not an archive of torch.save, or is cut short",
                path=file,
                found=error,
                remedy="copy the file again",
            ) from error
        if not pickles:
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
            order = np.empty(min(info.file_size, _LONGEST_MARK), np.uint8)
            offset = _data_offset(self.file, info.filename, info.header_offset)
            read_array(self.file, offset, order, info.filename)
            if order.tobytes() != b"little":
                raise CheckpointError(
                    "is not little-endian", path=self.file, expected=b"little", found=order.tobytes()
                )


class _Globals:
    """The names that a pickle of tensors may mention."""

    def __init__(self, archive: _Archive):
        self.file = archive.file
        calls: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": lambda: {},
            "torch._utils._rebuild_tensor_v2": functools.partial(_rebuild_tensor, archive.file),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }
        self.allowed = {name: Global(name, call) for name, call in calls.items()}
        self.allowed |= {f"torch.{storage}": Global(storage) for storage in STORAGES}

    def __call__(self, module: str, name: str) -> Global:
        """Return a global. Raises `CheckpointError` for any that does not describe a tensor."""
        if (known := self.allowed.get(f"{module}.{name}")) is None:
            raise CheckpointError(
                "the pickle asks for something that weights do not need",
                path=self.file,
                key=f"{module}.{name}",
                expected="only tensors",
                remedy="do not load this file with any program, unless you know who wrote it and why",
            )
        return known


class _References:
    """The storages of an archive, as its pickle refers to them."""

    def __init__(self, archive: _Archive):
        self.archive = archive
        self.storages: dict[str, Storage] = {}

    def __call__(self, identifier: Any) -> Storage:
        """Return a storage. Raises `ValueError` or `TypeError` for an identifier of another form."""
        kind, storage, key, _location, size = identifier
        if kind != "storage" or not isinstance(storage, Global) or storage.name not in STORAGES:
            raise ValueError("a reference to something that is not a storage")
        if type(key) is not str or type(size) is not int or size < 0:
            raise ValueError("a reference without the name and the size of a storage")
        if key not in self.storages:
            self.storages[key] = self.archive.storage(key, STORAGES[storage.name], size)
        return self.storages[key]


def _rebuild_tensor(
    file: Path, storage: Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> TorchTensor:
    """Return the tensor that a call of torch's function of this name describes."""
    if not isinstance(storage, Storage) or not all(
        type(number) is int for number in (offset, *shape, *strides)
    ):
        raise TypeError("a tensor whose storage, offset, shape or strides are none")
    refused = len(shape) != len(strides) or len(shape) > _MOST_AXES or min((offset, *shape, *strides)) < 0
    # A view that repeats values would take more memory than the file has bytes.
    refused = refused or math.prod(max(1, size) for size in shape) > _MOST_VALUES
    refused = refused or math.prod(shape) > storage.size
    if refused or offset + (_span(shape, strides) if math.prod(shape) else 0) > storage.size:
        raise CheckpointError(
            "a tensor reaches beyond its storage",
            path=file,
            key=storage.member,
            expected=f"at most {storage.size:,} values",
            found=f"offset {offset}, shape {list(shape)}, strides {list(strides)}",
        )
    return TorchTensor("", storage, offset, tuple(shape), tuple(strides))


def _data_offset(file: Path, member: str, header: int) -> int:
    data = np.empty(_LOCAL_HEADER.size, np.uint8)
    read_array(file, header, data, member)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(data.tobytes())
    if signature != b"PK\x03\x04":
        raise CheckpointError(
            "the archive is damaged", path=file, key=member, expected=b"PK\x03\x04", found=signature
        )
    return header + _LOCAL_HEADER.size + name_length + extra_length


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of values from the first to the last of a view that is not empty."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
