"""A directory is locked by one process at a time, with and without locks of the file system."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qmoe_jax.files import lock
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.lock import Lock


@pytest.fixture(params=["flock", "without flock"])
def path(request, tmp_path: Path, monkeypatch) -> Path:
    """A lock's file, on a file system of either kind."""
    if request.param == "without flock":
        no_flock(monkeypatch, errno.ENOLCK)
    return tmp_path / ".lock-0"


def no_flock(monkeypatch, number: int) -> None:
    def refuse(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_held_lock_is_refused_and_names_the_directory_and_the_holder(path: Path) -> None:
    held = Lock(path)
    expected = rf"{path.parent}: is being written by another process\n  found: process {os.getpid()} on \S+\n"
    with pytest.raises(CheckpointError, match=expected):
        Lock(path)
    held.release()


def test_a_released_lock_can_be_taken_again_and_again(path: Path) -> None:
    for _ in range(5):
        Lock(path).release()
    assert path.exists()
    assert len(list(path.parent.iterdir())) <= 3


def test_of_many_who_take_it_at_once_one_holds_it(path: Path) -> None:
    Lock(path).release()
    start, held, refused = threading.Barrier(8), [], []

    def take() -> None:
        start.wait()
        try:
            held.append(Lock(path))
        except CheckpointError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].release()


PROGRAM = """
import errno, fcntl, sys, types
from pathlib import Path
package = sys.modules["qmoe_jax"] = types.ModuleType("qmoe_jax")  # without jax, which takes seconds
package.__path__ = [sys.argv[3]]
from qmoe_jax.files.lock import Lock
def refuse(*_): raise OSError(errno.ENOLCK, "")
if sys.argv[2] == "refuse": fcntl.flock = refuse
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_free(path: Path) -> None:
    kind = "refuse" if fcntl.flock.__name__ == "refuse" else "take"
    command = [sys.executable, "-c", PROGRAM, str(path), kind, str(Path(lock.__file__).parent.parent)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(CheckpointError, match="another process"):
        Lock(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    Lock(path).release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_flock_is_locked_otherwise(tmp_path: Path, monkeypatch, number: int) -> None:
    no_flock(monkeypatch, number)
    Lock(tmp_path / ".lock-0").release()
    assert (tmp_path / ".lock-0.1").exists()


def test_another_error_is_told(tmp_path: Path, monkeypatch) -> None:
    no_flock(monkeypatch, errno.EIO)
    with pytest.raises(CheckpointError, match=r"\.lock-0: cannot be locked(.|\n)*check the disk"):
        Lock(tmp_path / ".lock-0")


@pytest.mark.parametrize(
    "other",
    [{"boot": "another machine's"}, {"processes": "pid:[another container's]"}, {"boot": None}],
    ids=["machine", "container", "unknown"],
)
def test_a_holder_that_cannot_be_seen_from_here_is_taken_to_live(tmp_path: Path, monkeypatch, other) -> None:
    no_flock(monkeypatch, errno.ENOLCK)
    holder = lock._identity(os.getpid()) | {"began": "0"} | other
    (tmp_path / ".lock-0.7").write_text(json.dumps(holder))
    with pytest.raises(CheckpointError, match=r"remove .*\.lock-0\.7"):
        Lock(tmp_path / ".lock-0")


def test_a_holder_that_is_not_yet_written_is_taken_to_live(tmp_path: Path, monkeypatch) -> None:
    no_flock(monkeypatch, errno.ENOLCK)
    (tmp_path / ".lock-0.7").touch()
    with pytest.raises(CheckpointError, match="another process"):
        Lock(tmp_path / ".lock-0")


def test_a_process_that_is_late_gives_up(tmp_path: Path, monkeypatch) -> None:
    """It has listed the directory, then others take and release the lock until its number is free again."""
    no_flock(monkeypatch, errno.ENOLCK)
    path, listed = tmp_path / ".lock-0", lock._numbers
    Lock(path).release()
    others = []

    def late(path: Path) -> list[int]:
        monkeypatch.setattr(lock, "_numbers", listed)
        numbers = listed(path)
        for _ in range(3):
            Lock(path).release()
        others.append(Lock(path))
        return numbers

    monkeypatch.setattr(lock, "_numbers", late)
    with pytest.raises(CheckpointError, match="another process"):
        Lock(path)
    others[0].release()
