"""Facts about compiled kernels, read from a cubin by NVIDIA's own tools (PyPI: cuobjdump and nvdisasm).

A cubin is the ELF file that ptxas writes. Neither tool needs a GPU or a driver.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import re
import subprocess
from collections.abc import Iterable, Iterator
from typing import Any

MAGIC = b"\x7fELF\x02\x01"
INSTRUCTION_BYTES = 16  # since Volta
TOOLS = {"cuobjdump": "nvidia-cuda-cuobjdump", "nvdisasm": "nvidia-cuda-nvdisasm"}
USAGE = re.compile(
    r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The size of one kernel.

    Attributes:
      name: the symbol.
      registers: registers per thread.
      stack_bytes: bytes of local memory per thread. Spilled registers go there: a kernel that has no local arrays
        and 0 bytes of stack spills nothing.
      shared_bytes: statically allocated shared memory per block.
      instructions: instructions of the whole kernel, padding included.
      loops: instructions of each loop, from the target of a backward branch to the branch; nested loops count.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    loops: tuple[int, ...]


def refusal() -> str | None:
    """Return why cubins cannot be read here, or None if they can."""
    missing = [package for tool, package in TOOLS.items() if _find_tool(tool) is None]
    return f"not installed: {' and '.join(missing)} (in the extra `test`, for Linux)" if missing else None


def read_kernels(data: bytes, folder: pathlib.Path) -> list[Kernel]:
    """Return the kernels of every cubin that `data` contains uncompressed, such as a message of XLA's.

    Args:
      data: any bytes.
      folder: an existing directory for the tools' input files.

    Raises:
      subprocess.CalledProcessError: a tool cannot read a cubin.
    """
    kernels = []
    for index, match in enumerate(re.finditer(re.escape(MAGIC), data)):
        path = folder / f"{index}.cubin"
        path.write_bytes(data[match.start() :])  # the tools ignore what follows the ELF file
        kernels += _read_cubin(path)
    return kernels


def find_loops(instructions: Iterable[dict[str, Any]]) -> Iterator[int]:
    """Yield the number of instructions of each loop.

    A kernel ends with a branch to itself, which is not a loop; nor is a branch back across an EXIT, which returns
    from code for diverged warps that the compiler moved behind the kernel.

    Args:
      instructions: as in nvdisasm's JSON, `{"opcode": "BRA", "operands": "P0,0x2b0"}`, in the order of addresses.
    """
    last_exit = 0
    for index, instruction in enumerate(instructions):
        if instruction["opcode"].startswith("EXIT"):
            last_exit = index
        elif instruction["opcode"].startswith("BRA"):
            target = int(instruction["operands"].split(",")[-1], 16) // INSTRUCTION_BYTES
            if last_exit <= target < index:
                yield index + 1 - target


def _read_cubin(path: pathlib.Path) -> Iterator[Kernel]:
    _, functions = json.loads(_run("nvdisasm", "--emit-json", path))
    code = {function["function-name"]: function["sass-instructions"] for function in functions}
    for usage in USAGE.finditer(_run("cuobjdump", "--dump-resource-usage", path)):
        instructions = code[usage["name"]]
        yield Kernel(
            name=usage["name"],
            registers=int(usage["registers"]),
            stack_bytes=int(usage["stack"]),
            shared_bytes=int(usage["shared"]),
            instructions=len(instructions),
            loops=tuple(find_loops(instructions)),
        )


def _run(tool: str, *arguments: object) -> str:
    command = [str(_find_tool(tool)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _find_tool(tool: str) -> pathlib.Path | None:
    """Return the path of the program in its wheel, or None if the wheel is not installed."""
    try:
        files = importlib.metadata.files(TOOLS[tool]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((pathlib.Path(str(file.locate())) for file in files if file.name == tool), None)
