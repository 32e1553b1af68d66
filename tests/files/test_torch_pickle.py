"""Archives of `torch.save`, read without torch and without executing their pickles."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.torch_pickle import open_torch
from tests.helpers.torch_archives import write_torch_archive


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "torch.load", "numpy.ndarray", "torch._utils.x"]
)
def test_every_global_that_describes_no_tensor_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    module, attribute = name.rsplit(".", maxsplit=1)
    file = write_torch_archive(tmp_path / "x.bin", b"\x80\x02c" + f"{module}\n{attribute}\n.".encode())
    with pytest.raises(CheckpointError, match=name):
        open_torch(file)


def tensor_program(size: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """Return the pickle of a dict with one tensor, written by the standard library's own pickler."""

    class Reference:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", "FloatStorage", "0", "cpu", size) if isinstance(value, Reference) else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump((Reference(), offset, shape, strides, False, None))
    arguments = stream.getvalue()[2:-1].replace(
        pickle.BINUNICODE + b"\x0c\0\0\0FloatStorage", pickle.GLOBAL + b"torch\nFloatStorage\n"
    )
    call = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE
    key = pickle.BINUNICODE + b"\x01\0\0\0w"
    return b"\x80\x02" + pickle.EMPTY_DICT + key + call + pickle.SETITEM + pickle.STOP


@pytest.mark.parametrize("view", [(6, 0, (2, 3), (3, 1)), (6, 0, (3, 2), (1, 3)), (6, 5, (0, 9), (9, 1))])
def test_a_torch_tensor_is_the_view_that_its_strides_describe(view: tuple, tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32)
    file = write_torch_archive(tmp_path / "x.bin", tensor_program(*view), data_0=data.tobytes())
    _, offset, shape, strides = view
    want = np.lib.stride_tricks.as_strided(data[offset:], shape, [4 * stride for stride in strides])
    np.testing.assert_array_equal(open_torch(file)["w"].read(slice(0, shape[0])), want)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ((6, 1, (2, 3), (3, 1)), "beyond its storage"),
        ((6, 0, (2, 3), (4, 1)), "beyond its storage"),
        ((6, -1, (2,), (1,)), "beyond its storage"),
        ((6, 0, (2, 2), (-1, 1)), "beyond its storage"),
        ((7, 0, (2, 3), (3, 1)), "has another size"),
        ((2**60, 0, (2**60,), (1,)), "has another size"),
    ],
)
def test_a_torch_tensor_beyond_its_storage_is_refused(view: tuple, message: str, tmp_path: Path) -> None:
    file = write_torch_archive(tmp_path / "x.bin", tensor_program(*view), data_0=bytes(24))
    with pytest.raises(CheckpointError, match=message):
        open_torch(file)


@pytest.mark.parametrize("program", [b"\x80\x02K\x01.", b"\x80\x02", b"\x80\x02}q\x00(K\x01K\x02u."])
def test_a_pickle_without_a_dict_of_tensors_is_refused(program: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        open_torch(write_torch_archive(tmp_path / "x.bin", program))


def test_a_big_endian_archive_is_refused(tmp_path: Path) -> None:
    file = write_torch_archive(tmp_path / "x.bin", b"\x80\x02}.", byteorder=b"big")
    with pytest.raises(CheckpointError, match="not little-endian"):
        open_torch(file)
