"""Several processes share a run: the same bytes as one, also when one dies and others go on."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.helpers.artifact_bytes import stored_bytes

PROGRAM = pathlib.Path(__file__).parent.parent / "helpers" / "host_program.py"
OPTIONS = {"sentinel_start": 480, "method": "nearest", "experts_per_group": 2}
TIMEOUT = 300  # seconds, for a machine that is busy with other work


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def run(data, tmp_path):
    """Run the tiny model's compression in `count` processes; `dies_at`: group at which the last one dies."""

    def start(count: int, dies_at: int = 0) -> list[int]:
        port = free_port()
        paths = [data / "hf_tiny_a", data / "e2e_data.json", tmp_path / "model", tmp_path / "scratch"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        processes = []
        for index in range(count):
            dies = dies_at if index == count - 1 else 0
            arguments = [index, count, port, *paths, json.dumps(OPTIONS), dies]
            command = [sys.executable, str(PROGRAM), *map(str, arguments)]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        try:
            if dies_at:
                processes[-1].wait(TIMEOUT)  # what starts the processes ends the others then
                return [processes[-1].returncode]
            errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
            codes = [process.returncode for process in processes]
            assert codes == [0] * count, "\n".join(errors)
            return codes
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    return start


@pytest.fixture
def expected(compressed):
    """The bytes of one process."""
    options = {name: value for name, value in OPTIONS.items() if name != "sentinel_start"}
    return stored_bytes(compressed(**options)[0])


def test_two_hosts_give_the_bytes_of_one(run, tmp_path, expected):
    run(2)
    assert stored_bytes(tmp_path / "model") == expected
    assert not list((tmp_path / "scratch").iterdir())


def test_a_host_may_die_and_another_number_go_on(run, tmp_path, expected):
    assert run(4, dies_at=2) == [9]
    files = [*(tmp_path / "model" / "experts").rglob("*.safetensors")]
    written = {path: path.stat().st_mtime_ns for path in files}
    assert 1 <= len(written) < 16
    run(2)
    assert stored_bytes(tmp_path / "model") == expected
    assert {path: path.stat().st_mtime_ns for path in files} == written, "they were written again"
