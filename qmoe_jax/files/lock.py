"""A lock that one process holds on a directory while it writes there, on any file system.

Where the file system has `flock`, the system frees the lock however its holder ends. Elsewhere holders follow
one another as numbered files: who makes the next number, which one process can do, holds the lock, once the
holder before has released it or has ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
from pathlib import Path

from qmoe_jax.files.errors import CheckpointError, system_error

_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_RELEASED = b"released\n"


class Lock:
    """A lock that is held from its making until `release`.

    The file stays where it is: if it were removed, a process that had opened it before and another that makes
    a new one would both hold the lock.
    """

    def __init__(self, path: Path):
        """Take the lock.

        Args:
            path: the file of the lock, in the directory that is locked.

        Raises:
            CheckpointError: another process holds the lock, or the file cannot be made.
        """
        self._numbered: Path | None = None
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise system_error("cannot be locked", path, error) from error
        try:
            self._take(path)
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Let others take the lock."""
        if self._numbered is not None:
            with contextlib.suppress(OSError):  # the directory may be gone, and then it is free as well
                self._numbered.write_bytes(_RELEASED)
        os.close(self._descriptor)

    def _take(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 300, 0).decode(errors="replace").strip()
            raise _held(path.parent, "wait for it, or stop it", holder) from error
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise system_error("cannot be locked", path, error) from error
            try:
                self._numbered = _take_next_number(path)
            except OSError as failure:
                raise system_error("cannot be locked", path, failure) from failure
        else:
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name
                os.truncate(self._descriptor, 0)
                os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _take_next_number(path: Path) -> Path:
    """Make the file of the next holder; nobody else can make the same one.

    Files of earlier holders stay until there are two later ones: a process that is late, and makes a number
    that was removed, finds a higher one beside it and gives up.
    """
    numbers = _numbers(path)
    last = numbers[-1] if numbers else 0
    if numbers and not _is_free(holder := _numbered(path, last)):
        raise _held(
            path.parent,
            f"wait for it, or stop it; if it has ended (without locks that cannot be known), remove {holder}",
            _name_of(holder),
        )
    mine = _numbered(path, last + 1)
    try:
        descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError as error:
        raise _held(path.parent, "wait for it, or stop it") from error
    with open(descriptor, "wb", buffering=0) as stream:
        stream.write(json.dumps(_identity(os.getpid())).encode())
    if _numbers(path)[-1] != last + 1:
        mine.unlink()
        raise _held(path.parent, "wait for it, or stop it")
    for number in numbers[:-1]:
        with contextlib.suppress(OSError):
            _numbered(path, number).unlink()
    return mine


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _numbers(path: Path) -> list[int]:
    pattern = re.compile(re.escape(path.name) + r"\.(\d+)")
    return sorted(int(match[1]) for name in os.listdir(path.parent) if (match := pattern.fullmatch(name)))


def _name_of(holder: Path) -> str:
    """Return the process and host that hold a lock; empty where its file does not tell."""
    try:
        held = json.loads(holder.read_bytes())
        return f"process {held['pid']} on {held['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _is_free(holder: Path) -> bool:
    """Return whether a holder has released the lock, or is known to have ended."""
    try:
        content = holder.read_bytes()
    except FileNotFoundError:  # later holders have removed it: they are found when the next file is made
        return True
    if content == _RELEASED:
        return True
    try:
        held = json.loads(content)
        alive = _identity(held["pid"])
    except (ValueError, KeyError, TypeError):
        return False
    # Only processes of this boot and of this container are seen from here.
    here = all(alive[name] is not None and alive[name] == held.get(name) for name in ("boot", "processes"))
    return here and alive["began"] != held.get("began")


def _identity(pid: int) -> dict[str, str | int | None]:
    """Return what tells a process from all others, everywhere and later; None for what cannot be known."""
    boot = processes = began = None
    with contextlib.suppress(OSError):  # no /proc
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.readlink("/proc/self/ns/pid")
    with contextlib.suppress(OSError, IndexError):  # no such process
        # The program's name, in parentheses, may hold spaces; the 3rd field is the state, the 22nd the start.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        began = None if fields[0] in "ZX" else fields[19]  # Z, X: ended, but its parent has not asked for it
    return {"host": socket.gethostname(), "pid": pid, "boot": boot, "processes": processes, "began": began}


def _held(directory: Path, remedy: str, holder: str = "") -> CheckpointError:
    return CheckpointError(
        "is being written by another process", path=directory, found=holder or None, remedy=remedy
    )
