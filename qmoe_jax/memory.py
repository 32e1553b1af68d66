"""The memory that this process may use: of the machine, within the limits of its control groups and its own.

Containers see the whole machine's memory in /proc/meminfo; their limit is that of a control group (cgroup),
and of every group around it. What a group uses includes files that the system keeps in memory and gives back
when memory is short: these count as free, else reading a large checkpoint would leave nothing. Swap is not
counted.
"""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path("/")
"""Directory in which `proc` lies; mount points are below it too. Tests have others."""

_NO_LIMIT = 1 << 60
"""Bytes from which on a limit of version 1 means none: its largest is 2**63 rounded to pages."""

_FALLBACK_SHARE = 0.5
"""Share of the machine's memory taken to be available where the system does not tell (macOS)."""


@dataclasses.dataclass(frozen=True)
class _Group:
    """A control group: its limit and what it uses, in bytes, without files that can be given back."""

    limit: int
    used: int


def available_memory(root: Path = ROOT) -> int:
    """Return the bytes of host memory that this process can take now, 0 or more."""
    return max(
        0, min([_machine_available(root), *(g.limit - g.used for g in _groups(root)), *_own_room(root)])
    )


def usable_memory(root: Path = ROOT) -> int:
    """Return the bytes of host memory that this process may have at most, whatever is used now."""
    own = [limit for limit, _ in _own_limits()]
    return min([_machine_total(root), *(group.limit for group in _groups(root)), *own])


def resident_memory(root: Path = ROOT) -> int:
    """Return the bytes of memory that this process has now; where the system does not tell, its peak."""
    if (kibibytes := _fields(root / "proc/self/status").get("VmRSS")) is not None:
        return 1024 * kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def _machine_available(root: Path) -> int:
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable" in fields:
        return 1024 * fields["MemAvailable"]
    if "MemFree" in fields:  # Linux before 3.14
        return 1024 * (fields["MemFree"] + fields.get("Cached", 0))
    return int(_FALLBACK_SHARE * _machine_total(root))


def _machine_total(root: Path) -> int:
    total = _fields(root / "proc/meminfo").get("MemTotal")
    return 1024 * total if total else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _own_limits() -> Iterator[tuple[int, str]]:
    """Yield the limits of this process in bytes, each with what the system counts towards it."""
    for kind, counted in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit, counted


def _own_room(root: Path) -> Iterator[int]:
    used = _fields(root / "proc/self/status")
    yield from (limit - 1024 * used.get(counted, 0) for limit, counted in _own_limits())


def _groups(root: Path) -> Iterator[_Group]:
    """Yield the control groups that limit memory: the process's own, and those around it that can be seen."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            for directory in _directories(root, "cgroup2", "", path):
                yield from _version_2(directory)
        elif "memory" in controllers.split(","):
            for directory in _directories(root, "cgroup", "memory", path):
                yield from _version_1(directory)


def _version_2(directory: Path) -> Iterator[_Group]:
    # Above `memory.high` the kernel slows a process down until it stands still.
    limits = [_number(directory / name) for name in ("memory.max", "memory.high")]
    known = [limit for limit in limits if limit is not None]
    if known:
        statistics = _fields(directory / "memory.stat")
        files = statistics.get("inactive_file", 0) + statistics.get("active_file", 0)
        yield _Group(min(known), max(0, (_number(directory / "memory.current") or 0) - files))


def _version_1(directory: Path) -> Iterator[_Group]:
    statistics = _fields(directory / "memory.stat")
    # The second includes groups around a container, which it does not see.
    limits = (_number(directory / "memory.limit_in_bytes"), statistics.get("hierarchical_memory_limit"))
    known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
    if known:
        files = sum(
            statistics.get(f"total_{name}", statistics.get(name, 0))
            for name in ("inactive_file", "active_file")
        )
        yield _Group(min(known), max(0, (_number(directory / "memory.usage_in_bytes") or 0) - files))


def _directories(root: Path, kind: str, controller: str, group: str) -> Iterator[Path]:
    """Yield the directory of a control group and of those around it, from the process's own outwards.

    Args:
        root: see `ROOT`.
        kind: type of the file system that shows it, "cgroup" or "cgroup2".
        controller: the controller whose mount it is, in version 1.
        group: path of the group, as in /proc/self/cgroup.
    """
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mount, kinds = before.split(), after.split()
        if kinds[:1] != [kind] or (controller and controller not in kinds[-1].split(",")):
            continue
        shown, point = PurePosixPath(_unescape(mount[3])), root / _unescape(mount[4]).lstrip("/")
        # A container may see its own group as the root of the mount, or be outside of what is mounted.
        path = PurePosixPath(group)
        below = path.relative_to(shown) if path.is_relative_to(shown) else PurePosixPath()
        if ".." in below.parts:
            below = PurePosixPath()
        directory = point / below
        yield from (place for place in (directory, *directory.parents) if place.is_relative_to(point))
        return


def _unescape(text: str) -> str:
    """Return a path of mountinfo, in which blanks and backslashes are octal numbers."""
    for code, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(code, character)
    return text


def _lines(file: Path) -> list[str]:
    try:
        return os.fsdecode(file.read_bytes()).splitlines()
    except OSError:
        return []


def _fields(file: Path) -> Mapping[str, int]:
    """Return the numbers of a file of lines such as `MemTotal: 8 kB` or `active_file 4096`, by name."""
    words = (line.replace(":", " ").split() for line in _lines(file))
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _number(file: Path) -> int | None:
    """Return the number in a file; None without one, for example for `max`."""
    text = "".join(_lines(file)[:1]).strip()
    return int(text) if text.isdecimal() else None
