"""Imports point only down: the layers of the architecture, checked on the source."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module belongs to the longest prefix that matches; it imports only modules of lower layers, or of its own
# room.
LAYERS = {
    "pallas_kernels": 0,
    "qmoe_jax.config": 1,
    "qmoe_jax.progress": 1,
    "qmoe_jax.memory": 0,
    "qmoe_jax.settings": 1,
    "qmoe_jax.files": 1,
    "qmoe_jax.parameters": 2,
    "qmoe_jax.quantization": 1,
    "qmoe_jax.coding": 2,
    "qmoe_jax.data": 2,
    "qmoe_jax.distributed": 2,
    "qmoe_jax.checkpoints": 3,
    "qmoe_jax.models": 3,
    "qmoe_jax.artifact": 4,
    "qmoe_jax.inference": 5,
    "qmoe_jax.compression": 6,
    "qmoe_jax.evaluation": 6,
    "qmoe_jax": 7,
    "qmoe_jax.cli": 8,
}


def room_of(module: str) -> str:
    return max((room for room in LAYERS if f"{module}.".startswith(f"{room}.")), key=len)


def imported_modules(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for module in found if module.split(".")[0] in ("qmoe_jax", "pallas_kernels")}


MODULES = sorted(
    path for package in ("qmoe_jax", "pallas_kernels") for path in (ROOT / package).rglob("*.py")
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_only_down(path: pathlib.Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = room_of(module)
    for target in imported_modules(path):
        there = room_of(target)
        assert there == here or LAYERS[there] < LAYERS[here], f"{module} ({here}) imports {target} ({there})"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_one_idea(path: pathlib.Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: split it"
