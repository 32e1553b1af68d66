"""Files that hold something else than their names say: recognized, with a remedy."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qmoe_jax.checkpoints import CheckpointError, open_dense
from qmoe_jax.data import TextError, Tokenizer
from qmoe_jax.files.foreign import foreign_error, recognize
from tests.helpers.checkpoint_samples import EXPERTS, LAYOUTS, TINY, random_parameters

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("weights", b"0" * 99)
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"), io.BytesIO())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (POINTER, ("git-lfs pointer", "git lfs pull", "size 123")),
        (b"\xef\xbb\xbf" + POINTER, ("git-lfs pointer",)),
        (b"/annex/objects/MD5-s1--0\n", ("git-annex pointer", "git annex get")),
        (b"\n <!DOCTYPE html><html>", ("web page", "download the file again")),
        (b"<html lang=en>", ("web page",)),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", ("message of a server", "AccessDenied")),
        (b"Entry not found", ("message of a server", "Entry not found")),
        (_zip(), ("zip archive", "unpack it")),
        (_tar(), ("tar archive", "unpack it")),
        (gzip.compress(b"a", mtime=0), ("compressed by gzip", "unpack it")),
        (bz2.compress(b"a"), ("compressed by bzip2",)),
        (lzma.compress(b"a"), ("compressed by xz",)),
        (b"\x89HDF\r\n\x1a\n", ("HDF5",)),
        (b"GGUF\x03\0\0\0", ("GGUF",)),
    ],
)
def test_a_foreign_file_is_named_with_a_remedy(data: bytes, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    for error in (foreign_error(tmp_path / "file"), foreign_error(tmp_path / "file", data)):
        assert error is not None
        for word in ("file", *words):
            assert word in str(error)


@pytest.mark.parametrize("data", [b"", b"{", b"version 3", b"\x80\x02", b"\x82\xa7version\x03"])
def test_other_files_are_not_taken_for_foreign(data: bytes) -> None:
    assert recognize(data) is None


def _first(pattern: str) -> Callable[[Path], Path]:
    return lambda path: sorted(path.glob(pattern))[0]


CHUNK = f"target.{EXPERTS.replace('/', '.')}"


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("safetensors", _first("model.safetensors")),
        ("safetensors", _first("config.json")),
        ("safetensors, shards", _first("model-00002-of-*")),
        ("safetensors, shards", _first("model.safetensors.index.json")),
        ("torch", _first("pytorch_model.bin")),
        ("torch, shards", _first("*-00002-of-*")),
        ("t5x", _first("checkpoint")),
        ("t5x", _first(f"{CHUNK}/.zarray")),
        ("t5x", _first(f"{CHUNK}/0.0.0")),
        ("t5x, all in the msgpack", lambda path: path),
        ("orbax, a directory an array", _first("checkpoint_7/state/_METADATA")),
        ("orbax, a directory an array", _first(f"checkpoint_7/state/{CHUNK}/0.0.0")),
    ],
)
def test_a_git_lfs_pointer_is_named_in_place_of_every_kind_of_file(
    layout: str, file: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = LAYOUTS[layout](tmp_path / "model", TINY, random_parameters())
    pointer = file(path)
    pointer.write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="git-lfs pointer") as caught:
        open_dense(path)
    assert pointer.name in str(caught.value)
    assert "git lfs pull" in str(caught.value)


def test_a_git_lfs_pointer_is_named_in_place_of_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(POINTER)
    with pytest.raises(TextError, match=r"spiece.model: is a git-lfs pointer(.|\n)*git lfs pull"):
        Tokenizer(tmp_path)
