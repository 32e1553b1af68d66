"""Fixtures of all tests: the golden data, and the relative difference of two arrays."""

import pathlib

import numpy as np
import pytest

DATA = pathlib.Path(__file__).parent / "golden"


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
