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
import tempfile
from collections.abc import Iterable, Iterator

MAGIC = b"\x7fELF\x02\x01"
INSTRUCTION_BYTES = 16  # since Volta
TOOLS = {"cuobjdump": "nvidia-cuda-cuobjdump", "nvdisasm": "nvidia-cuda-nvdisasm"}
USAGE = re.compile(
    r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The resources of one kernel.

    Attributes:
        name: the symbol.
        registers: registers per thread.
        stack_bytes: bytes of local memory per thread. Spilled registers go there: a kernel that has no local
          arrays and 0 bytes of stack spills nothing.
        shared_bytes: statically allocated shared memory per block.
        image: the cubin, and possibly bytes after it, which the tools ignore.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    image: bytes = dataclasses.field(repr=False)


def refusal() -> str | None:
    """Return why cubins cannot be read here, or None if they can."""
    missing = [package for tool, package in TOOLS.items() if _find_tool(tool) is None]
    return f"not installed: {' and '.join(missing)} (in the extra `test`, for Linux)" if missing else None


def read_kernels(data: bytes) -> list[Kernel]:
    """Return the kernels of every cubin that `data` contains uncompressed, such as a message of XLA's.

    Raises:
        subprocess.CalledProcessError: cuobjdump cannot read a cubin.
    """
    images = [data[match.start() :] for match in re.finditer(re.escape(MAGIC), data)]
    return [kernel for image in images for kernel in _kernels_of(image)]


def disassemble(kernel: Kernel) -> list[dict[str, str]]:
    """Return the instructions in the order of their addresses, padding included.

    Each is an object of nvdisasm's JSON, such as `{"predicate": "@P0", "opcode": "BRA", "operands":
    "0x2b0"}`. Takes 0.4 seconds, whatever the size of the kernel.

    Raises:
        subprocess.CalledProcessError: nvdisasm cannot read the cubin.
    """
    _, functions = json.loads(_run("nvdisasm", "--emit-json", image=kernel.image))
    return next(f["sass-instructions"] for f in functions if f["function-name"] == kernel.name)


def find_loops(instructions: Iterable[dict[str, str]]) -> Iterator[int]:
    """Yield the number of instructions of each loop, from the target of a backward branch to the branch.

    Nested loops count separately. A kernel ends with a branch to itself, which is not a loop; nor is a branch
    back across an EXIT, which returns from code for diverged warps that the compiler moved behind the kernel.
    """
    last_exit = 0
    for index, instruction in enumerate(instructions):
        if instruction["opcode"].startswith("EXIT"):
            last_exit = index
        elif instruction["opcode"].startswith("BRA"):
            target = int(instruction["operands"].split(",")[-1], 16) // INSTRUCTION_BYTES
            if last_exit <= target < index:
                yield index + 1 - target


def _kernels_of(image: bytes) -> Iterator[Kernel]:
    for usage in USAGE.finditer(_run("cuobjdump", "--dump-resource-usage", image=image)):
        yield Kernel(usage["name"], *(int(usage[key]) for key in ("registers", "stack", "shared")), image)


def _run(tool: str, option: str, *, image: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [str(_find_tool(tool)), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _find_tool(tool: str) -> pathlib.Path | None:
    """Return the path of the program in its wheel, or None if the wheel is not installed."""
    try:
        files = importlib.metadata.files(TOOLS[tool]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((pathlib.Path(str(file.locate())) for file in files if file.name == tool), None)
