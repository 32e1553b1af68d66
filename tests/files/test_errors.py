"""The system's errors have their path and a remedy, whoever met them."""

import errno

import pytest

from qmoe_jax.files.errors import CheckpointError, error_number, printable, system_error

FULL = "RESOURCE_EXHAUSTED: Error writing local file: No space left on device [os_error_code='28']"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError(FULL)])
def test_a_full_disk(error: Exception) -> None:
    told = str(system_error("cannot be written", "out/dense", error))
    assert told.startswith(
        "out/dense: cannot be written\n  found: No space left on device\n  remedy: free some"
    )


def test_an_error_without_a_number_keeps_its_first_line() -> None:
    assert error_number(ValueError("DATA_LOSS: damaged\nmore")) is None
    assert (
        system_error("cannot be read", "x", ValueError("DATA_LOSS: damaged\nmore")).found
        == "DATA_LOSS: damaged"
    )


def test_a_path_that_is_not_utf8_can_be_printed() -> None:
    assert printable("mod\udce9le") == "mod\\xe9le"
    str(CheckpointError("is missing", path="mod\udce9le")).encode()
