"""Writing of archives as `torch.save` writes them, without torch: a pickle and one member per storage."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from qmoe_jax.files.durable import durable_file
from qmoe_jax.files.torch_pickle import STORAGES

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_FORMAT_VERSION = b"3\n"  # of torch's archives, since 1.6


def save_torch(file: Path, entries: Mapping[str, np.ndarray | int]) -> None:
    """Save a dict of arrays and integers so that `torch.load` returns a dict of tensors and integers.

    As in torch, arrays that are views of one array stay views of one storage with their offsets and strides,
    and that storage is saved once, whole. Memory: the largest storage, twice. The file is whole or absent.

    Raises:
        CheckpointError: the file cannot be written.
    """
    storages: dict[int, tuple[str, np.ndarray]] = {}
    items = b"".join(_string(key) + _value(value, storages) for key, value in entries.items())
    program = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP
    with durable_file(file) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{file.stem}/data.pkl", program)
        archive.writestr(f"{file.stem}/byteorder", "little")
        for key, storage in storages.values():
            archive.writestr(f"{file.stem}/data/{key}", storage.tobytes())
        archive.writestr(f"{file.stem}/version", _FORMAT_VERSION)


def _value(value: np.ndarray | int, storages: dict[int, tuple[str, np.ndarray]]) -> bytes:
    """Return the instructions that leave a value on the unpickler's stack."""
    if not isinstance(value, np.ndarray):
        return _integer(int(value))
    if min(value.strides, default=0) < 0 or not _root(value).flags.c_contiguous:
        value = np.ascontiguousarray(value)
    root = _root(value)
    key, _ = storages.setdefault(id(root), (str(len(storages)), root))
    offset = (_address(value) - _address(root)) // value.itemsize if value.size else 0
    kind = _global("torch", _STORAGE_NAMES[value.dtype])
    reference = [_string("storage"), kind, _string(key), _string("cpu"), _integer(root.size)]
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = [
        _tuple(reference) + pickle.BINPERSID,
        _integer(offset),
        _tuple(map(_integer, value.shape)),
        _tuple(_integer(stride // value.itemsize) for stride in value.strides),
        pickle.NEWFALSE,  # requires no gradient
        hooks,
    ]
    return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(arguments) + pickle.REDUCE


def _root(array: np.ndarray) -> np.ndarray:
    """Return the array of the same dtype of which this one is a view, or itself."""
    while isinstance(array.base, np.ndarray) and array.base.dtype == array.dtype:
        array = array.base
    return array


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _string(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if 0 <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + bytes([9]) + value.to_bytes(9, "little", signed=True)


def _tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
