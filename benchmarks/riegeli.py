"""Reads the records of a Riegeli file: how XLA serializes a compiled program, and in it the GPU's machine code.

Enough of the two formats for that: simple chunks, stored or compressed by Snappy. Sources:
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md,
https://github.com/google/snappy/blob/main/format_description.txt.
"""

from __future__ import annotations

from collections.abc import Iterator

SIGNATURE = bytes.fromhex("83af70d10d884a3f")  # the hash with which every file begins
BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
SIMPLE_CHUNK = ord("r")
STORED, SNAPPY = 0, ord("s")


def leaves(data: bytes) -> Iterator[bytes]:
    """Every record of the first file inside `data`; where a record is a file again, the records of that."""
    for record in _records(data[data.index(SIGNATURE) :]):
        if record.startswith(SIGNATURE):
            yield from leaves(record)
        else:
            yield record


def _records(file: bytes) -> Iterator[bytes]:
    chunks = b"".join(file[at + BLOCK_HEADER : at + BLOCK] for at in range(0, len(file), BLOCK))
    at = 0
    while at + CHUNK_HEADER <= len(chunks):
        header = chunks[at : at + CHUNK_HEADER]
        size, kind, count = _int(header[8:16]), header[24], _int(header[25:32])
        at += CHUNK_HEADER
        if kind == SIMPLE_CHUNK and count:
            yield from _split(chunks[at : at + size], count)
        at += size


def _split(chunk: bytes, count: int) -> Iterator[bytes]:
    """The records of a simple chunk: their sizes come first, then their bytes."""
    sizes_size, at = _varint(chunk, 1)
    sizes = _decompressed(chunk[at : at + sizes_size], chunk[0])
    values = _decompressed(chunk[at + sizes_size :], chunk[0])
    end = next_size = 0
    for _ in range(count):
        size, next_size = _varint(sizes, next_size)
        yield values[end : end + size]
        end += size


def _decompressed(data: bytes, compression: int) -> bytes:
    if compression == STORED:
        return data
    if compression != SNAPPY:
        raise ValueError(f"expected a chunk stored or compressed by Snappy, found type {compression}")
    _, at = _varint(data, 0)  # the size again, as Riegeli has it
    return unsnap(data[at:])


def unsnap(data: bytes) -> bytes:
    """The bytes that Snappy compressed into `data`."""
    size, at = _varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag, at = data[at], at + 1
        if tag & 3 == 0:
            length, at = _literal_length(tag, data, at)
            out += data[at : at + length]
            at += length
            continue
        if tag & 3 == 1:
            length, offset, at = (tag >> 2 & 7) + 4, (tag >> 5) << 8 | data[at], at + 1
        else:
            bytes_of_offset = 2 if tag & 3 == 2 else 4
            length, offset = (tag >> 2) + 1, _int(data[at : at + bytes_of_offset])
            at += bytes_of_offset
        _repeat(out, offset, length)
    if len(out) != size:
        raise ValueError(f"expected {size} bytes from Snappy, found {len(out)}")
    return bytes(out)


def _literal_length(tag: int, data: bytes, at: int) -> tuple[int, int]:
    bytes_of_length = max((tag >> 2) - 59, 0)  # lengths beyond 60 follow the tag
    length = _int(data[at : at + bytes_of_length]) if bytes_of_length else tag >> 2
    return length + 1, at + bytes_of_length


def _repeat(out: bytearray, offset: int, length: int) -> None:
    """Appends what lies `offset` back, which may run into itself."""
    pattern = out[-offset:][:length]
    out += (pattern * -(-length // len(pattern)))[:length]


def _int(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(an integer of seven bits a byte, where the next thing begins)."""
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
