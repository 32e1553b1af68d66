"""The readers of what XLA compiled: Snappy and Riegeli by bytes made by hand, loops as nvdisasm shows them."""

import struct

import cubin
import pytest
import riegeli


def test_snappy_copies_may_run_into_themselves():
    # "ab", then eight bytes from two back; a literal; four bytes from twelve back with a long offset.
    packed = bytes([15, 1 << 2]) + b"ab" + bytes([1 | 4 << 2, 2]) + bytes([0]) + b"c"
    packed += bytes([2 | 3 << 2]) + (11).to_bytes(2, "little")
    assert riegeli.unsnap(packed) == b"ababababab" + b"c" + b"abab"


def test_snappy_literals_may_say_their_length_in_bytes():
    literal = bytes(range(200))
    packed = bytes([200, 1, 60 << 2, 199]) + literal
    assert riegeli.unsnap(packed) == literal


def test_a_torn_stream_is_refused():
    with pytest.raises(ValueError, match="expected 9 bytes from Snappy, found 2"):
        riegeli.unsnap(bytes([9, 1 << 2]) + b"ab")


def file_of(*records: bytes) -> bytes:
    """A Riegeli file with one stored chunk; the hashes, which are not read, are zero but for the first."""
    sizes = b"".join(struct.pack("BB", len(record) & 127 | 128, len(record) >> 7) for record in records)
    data = bytes([0, len(sizes)]) + sizes + b"".join(records)
    header = bytes(8) + struct.pack("<Q", len(data)) + bytes(8) + b"r" + len(records).to_bytes(7, "little")
    return riegeli.SIGNATURE + bytes(16) + header + bytes(8) + data


def test_records_and_the_records_of_files_inside_them():
    inner = file_of(b"three", b"")
    assert list(riegeli.leaves(b"before" + file_of(b"one", inner, b"two"))) == [b"one", b"three", b"", b"two"]


NOP = (0x0000000000007918, 0x000FC00000000000)
SELF = {80: (0xFFFFFFF000007947, 0x000FC0000383FFFF), 90: (0xFFFFFFFC00FC7947, 0x000FC0000383FFFF)}


@pytest.mark.parametrize(
    "capability, branch, loop",
    [
        (90, (0xFFFFFFF000105947, 0x000FEC000383FFFF), (0x1270 - 0x2B0) // 16),
        (80, (0xFFFFF08000005947, 0x000FEA000383FFFF), (0x1200 - 0x280) // 16),
    ],
)
def test_loops_end_where_a_branch_leads_back(capability, branch, loop):
    words = [NOP] * loop + [branch, SELF[capability], NOP]
    code = b"".join(struct.pack("<QQ", *word) for word in words)
    assert list(cubin.loops(code, capability)) == [loop]


def test_a_branch_back_across_an_exit_is_no_loop():
    leave = (0x000000000000094D, 0x000FEA0003800000)
    back = (0xFFFFFFF000105947, 0x000FEC000383FFFF)
    code = b"".join(struct.pack("<QQ", *word) for word in [NOP] * 252 + [leave, back])
    assert list(cubin.loops(code, 90)) == []


def test_branches_ahead_are_no_loops():
    ahead = struct.pack("<QQ", 0x0000001000349947, 0x000FEA0003800000)
    assert list(cubin.loops(ahead, 90)) == []
