"""Memory as a container sees it: trees of /proc and of control groups as runtimes lay them out."""

import resource
from pathlib import Path

import pytest

from qmoe_jax.memory import available_memory, usable_memory

KB, GB = 1024, 10**9
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "40 23 0:35 {shown} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
LARGEST = 9223372036854771712
"""The limit that version 1 shows of a group without one."""


class Machine:
    """A machine's files below a directory."""

    def __init__(self, root: Path):
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 * GB // KB} kB\nMemAvailable: {50 * GB // KB} kB\n")

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def group(self, path: str, **files: object) -> None:
        """Write the files of a control group; `stat` is memory.stat as a dict."""
        stat = files.pop("stat", {})
        assert isinstance(stat, dict)
        self.write(f"{path}/memory.stat", "\n".join(f"{name} {value}" for name, value in stat.items()))
        for name, value in files.items():
            self.write(f"{path}/memory.{name}", value)

    def member_of(self, cgroup: str, mountinfo: str) -> None:
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", "23 1 8:1 / / rw - ext4 /dev/sda rw\n" + mountinfo)

    @property
    def available(self) -> int:
        return available_memory(self.root)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of 64 GB, 50 of them available, whose processes have no limits of their own."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    return Machine(tmp_path)


def about(value: float) -> object:
    return pytest.approx(value, abs=KB)


def test_without_control_groups_the_machine_decides(machine: Machine) -> None:
    assert machine.available == about(50 * GB)
    assert usable_memory(machine.root) == about(64 * GB)


@pytest.mark.parametrize("limit", ["max", 100 * GB])
def test_a_limit_above_the_machine_changes_nothing(machine: Machine, limit: object) -> None:
    machine.member_of("0::/app", V2)
    machine.group("sys/fs/cgroup/app", max=limit, high="max", current=GB)
    assert machine.available == about(50 * GB)


def test_files_that_the_system_can_give_back_count_as_free(machine: Machine) -> None:
    machine.member_of("0::/app", V2)
    stat = {"anon": GB, "inactive_file": 4 * GB, "active_file": 3 * GB}
    machine.group("sys/fs/cgroup/app", max=8 * GB, high="max", current=8 * GB, stat=stat)
    assert machine.available == 7 * GB
    assert usable_memory(machine.root) == 8 * GB


def test_the_tightest_of_all_groups_around_the_process_counts(machine: Machine) -> None:
    machine.member_of("0::/pod/app", V2)
    machine.group("sys/fs/cgroup/pod/app", max=20 * GB, high="max", current=GB)
    machine.group("sys/fs/cgroup/pod", max=16 * GB, high="max", current=12 * GB)
    assert machine.available == 4 * GB
    assert usable_memory(machine.root) == 16 * GB


def test_memory_high_is_a_limit(machine: Machine) -> None:
    machine.member_of("0::/app", V2)
    machine.group("sys/fs/cgroup/app", max="max", high=6 * GB, current=GB)
    assert machine.available == 5 * GB


def test_a_group_beyond_its_limit_has_nothing_left(machine: Machine) -> None:
    machine.member_of("0::/app", V2)
    machine.group("sys/fs/cgroup/app", max="max", high=GB, current=2 * GB)
    assert machine.available == 0


@pytest.mark.parametrize("group", ["/", "/../../other", "/docker/abc"])
def test_a_container_sees_its_own_group_as_the_root(machine: Machine, group: str) -> None:
    machine.member_of(f"0::{group}", V2)
    machine.group("sys/fs/cgroup", max=3 * GB, current=GB)
    assert machine.available == 2 * GB


def test_a_mount_elsewhere_with_a_blank_in_its_path(machine: Machine) -> None:
    machine.member_of("0::/app", V2.replace("/sys/fs/cgroup", r"/run/my\040groups"))
    machine.group("run/my groups/app", max=3 * GB, current=GB)
    assert machine.available == 2 * GB


@pytest.mark.parametrize("shown", ["/", "/docker/abc"])
def test_version_1(machine: Machine, shown: str) -> None:
    machine.member_of("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/", V1.format(shown=shown))
    group = "sys/fs/cgroup/memory" + ("/docker/abc" if shown == "/" else "")
    stat = {"total_inactive_file": GB, "total_active_file": GB, "inactive_file": 0, "active_file": 0}
    machine.group(group, limit_in_bytes=8 * GB, usage_in_bytes=4 * GB, stat=stat)
    assert machine.available == 6 * GB


def test_version_1_without_a_limit(machine: Machine) -> None:
    machine.member_of("4:memory:/app", V1.format(shown="/"))
    machine.group("sys/fs/cgroup/memory/app", limit_in_bytes=LARGEST, usage_in_bytes=GB)
    assert machine.available == about(50 * GB)


def test_version_1_tells_of_groups_outside_of_the_container(machine: Machine) -> None:
    machine.member_of("4:memory:/app", V1.format(shown="/app"))
    stat = {"hierarchical_memory_limit": 5 * GB}
    machine.group("sys/fs/cgroup/memory", limit_in_bytes=LARGEST, usage_in_bytes=GB, stat=stat)
    assert machine.available == 4 * GB


def test_both_versions_mounted_at_once(machine: Machine) -> None:
    hybrid = V1.format(shown="/") + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    machine.member_of("4:memory:/app\n0::/app", hybrid)
    machine.group("sys/fs/cgroup/memory/app", limit_in_bytes=4 * GB, usage_in_bytes=GB)
    machine.write("sys/fs/cgroup/unified/app/cgroup.procs", 1)
    assert machine.available == 3 * GB


def test_a_kernel_that_does_not_tell_what_is_available(machine: Machine) -> None:
    machine.write("proc/meminfo", "MemTotal: 4000000 kB\nMemFree: 1000000 kB\nCached: 500000 kB")
    assert machine.available == 1_500_000 * KB


def test_a_system_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert 0 < available_memory(tmp_path) <= usable_memory(tmp_path) // 2


def test_a_limit_of_the_process(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.write("proc/self/status", f"Name:\tpython\nVmSize:\t{2 * GB // KB} kB\nVmData:\t{GB // KB} kB")
    limits = {resource.RLIMIT_AS: 5 * GB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind],) * 2)
    assert machine.available == about(3 * GB)
    assert usable_memory(machine.root) == 5 * GB


def test_this_machine() -> None:
    assert 0 < available_memory() <= usable_memory()
