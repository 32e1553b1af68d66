"""Hidden states that do not fit in memory are mapped from a file whose room is allocated first."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.blockwise import states
from qmoe_jax.inference.blockwise.states import HiddenStates


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "usable_memory", lambda: 1000)


def test_mapped_states_hold_what_is_written_and_leave_no_file(tmp_path: Path) -> None:
    mapped = HiddenStates([100, 50], 8, tmp_path)
    assert isinstance(mapped.values, np.memmap)
    assert not mapped.values.any()
    mapped.values[:] = 1.5
    assert (mapped.values == 1.5).all()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        CheckpointError, match=r"4,800 bytes free(.|\n)*No space left(.|\n)*remedy: free"
    ) as caught:
        HiddenStates([100, 50], 8, tmp_path)
    assert caught.value.path == str(tmp_path)
