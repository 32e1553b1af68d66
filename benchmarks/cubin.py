"""What a GPU's machine code says of itself: registers, stack, shared memory and the length of its loops.

Reads the ELF file that ptxas writes (a "cubin") without NVIDIA's tools. The stack frame is where spilled registers
go: a kernel that has no local arrays and a frame of 0 bytes spills nothing.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

MAGIC = b"\x7fELF\x02\x01"
SECTION = struct.Struct("<IIQQQQIIQQ")
INSTRUCTION_BYTES = 16  # since Volta
VALUE_FORMAT, REGISTER_COUNT, FRAME_SIZE = 4, 0x2F, 0x11  # of .nv.info
BRANCH, EXIT = 0x947, 0x94D  # the low twelve bits of an instruction


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin.

    Attributes:
      registers: a thread's.
      stack_bytes: a thread's frame in local memory: spilled registers, or arrays.
      shared_bytes: shared memory of fixed size, a block's.
      instructions: all of them.
      loops: instructions of each loop, from the target of a branch backwards to the branch; nested ones count.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    loops: tuple[int, ...]


def kernels(data: bytes, capability: int) -> Iterator[Kernel]:
    """The kernels of every cubin in `data`, for a GPU of that compute capability (80, 90)."""
    at = data.find(MAGIC)
    while at >= 0:
        yield from _kernels_of(data[at:], capability)
        at = data.find(MAGIC, at + 1)


def _kernels_of(elf: bytes, capability: int) -> Iterator[Kernel]:
    sections = _sections(elf)
    registers, frames = (_info(elf, sections, attribute) for attribute in (REGISTER_COUNT, FRAME_SIZE))
    for name in registers:
        code = _bytes(elf, sections[f".text.{name}"])
        shared = sections.get(f".nv.shared.{name}")
        yield Kernel(
            name=name,
            registers=registers[name],
            stack_bytes=frames[name],
            shared_bytes=shared[5] if shared else 0,
            instructions=len(code) // INSTRUCTION_BYTES,
            loops=tuple(loops(code, capability)),
        )


def loops(code: bytes, capability: int) -> Iterator[int]:
    """Instructions of each loop.

    Neither the branch to itself that ends every kernel is one, nor a branch back across an exit: that one comes from
    a path for warps whose threads went apart, which the compiler moved behind the kernel.
    """
    last_exit = 0
    for at in range(0, len(code), INSTRUCTION_BYTES):
        low, high = struct.unpack_from("<QQ", code, at)
        if low & 0xFFF == EXIT:
            last_exit = at
        if low & 0xFFF != BRANCH:
            continue
        distance = _distance(low, high, capability)
        if distance < -INSTRUCTION_BYTES and at + INSTRUCTION_BYTES + distance >= last_exit:
            yield -distance // INSTRUCTION_BYTES


def _distance(low: int, high: int, capability: int) -> int:
    """Bytes from behind a branch to its target."""
    field = low >> 32 | (high & 0x3FFFF) << 32  # signed, of fifty bits
    distance = field - (1 << 50) if field >> 49 else field
    return (distance << 8) + (low >> 16 & 0xFF) * 4 if capability >= 90 else distance


def _sections(elf: bytes) -> dict[str, tuple[int, ...]]:
    """The section headers by name; fields 4 and 5 are the offset and the size."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    count, names = struct.unpack_from("<HH", elf, 60)
    headers = [SECTION.unpack_from(elf, start + SECTION.size * i) for i in range(count)]
    return {_text(elf, headers[names][4] + header[0]): header for header in headers}


def _info(elf: bytes, sections: dict[str, tuple[int, ...]], attribute: int) -> dict[str, int]:
    """That attribute of each kernel."""
    data, symbols, names = (_bytes(elf, sections[name]) for name in (".nv.info", ".symtab", ".strtab"))
    found, at = {}, 0
    while at < len(data):
        form, kind, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form != VALUE_FORMAT:
            continue  # the value is in `size`
        if kind == attribute:
            symbol, value = struct.unpack_from("<II", data, at)
            found[_text(names, struct.unpack_from("<I", symbols, 24 * symbol)[0])] = value
        at += size
    return found


def _bytes(elf: bytes, section: tuple[int, ...]) -> bytes:
    return elf[section[4] : section[4] + section[5]]


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
