"""Fixtures of all tests: the golden data, and the relative difference of two arrays.

Tests marked `devices` run in a session of eight devices (`tests/helpers/devices.py`).
"""

import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest

from tests.helpers import devices
from tests.helpers.stores import s3_server

# Most of the suite's time is XLA compiling small programs: without LLVM's optimizations, a quarter less.
# `make test-isa` sets flags of its own, and so runs the golden and parity tests fully optimized.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Workers and the programs that tests start share what they compile, for as long as the run lasts. Set
# JAX_COMPILATION_CACHE_DIR to keep it between runs, which are then three times as fast.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="qmoe-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

TESTS = pathlib.Path(__file__).parent
DATA = TESTS / "golden"

# Folders and modules that compile no model: `make check` runs these alone.
FAST = (
    "artifact/test_groups.py",
    "artifact/test_kinds.py",
    "checkpoints",
    "coding",
    "contracts",
    "data",
    "files",
    "models/test_router.py",
    "pallas_kernels/test_backend.py",
    "pallas_kernels/test_operands.py",
    "pallas_kernels/test_tuning.py",
    "quantization/test_grids.py",
    "test_layers.py",
    "test_parameters.py",
    "test_progress.py",
    "test_style.py",
)

pytest_configure = devices.pytest_configure
pytest_runtest_protocol = devices.pytest_runtest_protocol


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `FAST`."""
    for item in items:
        if item.path.relative_to(TESTS).as_posix().startswith(FAST):
            item.add_marker("fast")


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
    """The folder of golden data; its README says what each file is."""
    return DATA


@pytest.fixture(scope="session")
def relative():
    """Largest difference relative to the largest expected magnitude."""

    def difference(found, expected) -> float:
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        return float(np.abs(found - expected).max() / np.abs(expected).max())

    return difference


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of a bucket on a local S3 server."""
    yield from s3_server()


@pytest.fixture
def s3_url(s3: str, request: pytest.FixtureRequest) -> str:
    """A URL of a test's own, below which nothing is."""
    return f"{s3}/{request.node.name.replace('[', '-').replace(']', '')}"
