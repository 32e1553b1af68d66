"""Compressed text: every compression, damage, and names that say something else than the bytes."""

import bz2
import gzip
import lzma
import sys

import pytest

from qmoe_jax.data import TextError, read_documents

ROWS = "".join(f'{{"text": "number {number}"}}\n' for number in range(3000)).encode()
TEXTS = [f"number {number}" for number in range(3000)]


def compress_zstd(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = pytest.importorskip("backports.zstd", reason="optional: pip install backports.zstd")
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: True})


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": compress_zstd}
each_compression = pytest.mark.parametrize("suffix", COMPRESS)


def documents(path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return list(read_documents(path))


@each_compression
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.jsonl", "corpus"])
def test_the_suffix_of_a_compression_comes_last(tmp_path, suffix, name):
    assert documents(tmp_path / f"{name}{suffix.upper()}", COMPRESS[suffix](ROWS)) == TEXTS


@each_compression
def test_members_that_were_concatenated_are_read_whole(tmp_path, suffix):
    parts = [COMPRESS[suffix](part) for part in (ROWS[:100], b"", ROWS[100:])]
    assert documents(tmp_path / f"a.jsonl{suffix}", b"".join(parts)) == TEXTS


@each_compression
def test_padding_of_zeros_is_not_data(tmp_path, suffix):
    assert documents(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](ROWS) + b"\0" * 20_000) == TEXTS


@each_compression
@pytest.mark.parametrize("damage", ["cut", "cut in the second member", "changed", "garbage after it"])
def test_damage_is_named(tmp_path, suffix, damage):
    whole = COMPRESS[suffix](ROWS)
    changed = bytearray(whole)
    changed[60:68] = b"\xff" * 8
    content = {
        "cut": whole[:-20],
        "cut in the second member": whole + whole[:-20],
        "changed": bytes(changed),
        "garbage after it": whole + b"garbage",
    }[damage]
    path = tmp_path / f"a.jsonl{suffix}"
    with pytest.raises(TextError) as caught:
        documents(path, content)
    assert caught.value.path == str(path)
    assert "is damaged" in caught.value.problem  # also where damage has made odd text
    assert caught.value.remedy


@each_compression
def test_text_that_is_not_compressed_is_named(tmp_path, suffix):
    with pytest.raises(
        TextError, match=rf"is not what its name says(.|\n)*as {suffix} tells(.|\n)*take {suffix}"
    ):
        COMPRESS[suffix](b"")  # skips where the library is missing
        documents(tmp_path / f"a.jsonl{suffix}", ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.xz"])
def test_another_compression_than_the_name_says_is_named(tmp_path, name):
    expected = rf"{name}: is not what its name says(.|\n)*compressed by gzip(.|\n)*end in \.gz"
    with pytest.raises(TextError, match=expected):
        documents(tmp_path / name, gzip.compress(ROWS))


@pytest.mark.parametrize("content", [b"", gzip.compress(b"", mtime=0)])
def test_an_archive_without_text_is_named(tmp_path, content):
    with pytest.raises(TextError, match=r"a\.jsonl\.gz: holds no text"):
        documents(tmp_path / "a.jsonl.gz", content)


def test_a_zip_archive_is_named(tmp_path):
    with pytest.raises(TextError, match=r"is a zip archive(.|\n)*unpack it"):
        documents(tmp_path / "a.jsonl", b"PK\x03\x04" + b"\0" * 40)


def test_without_a_library_for_zstd_the_file_is_refused_by_naming_what_is_read(tmp_path, monkeypatch):
    for module in ("backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TextError, match=r"a\.jsonl\.zst: is compressed by zstd(.|\n)*\.gz(.|\n)*pip install"):
        documents(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd")
