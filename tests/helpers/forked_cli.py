"""Runs of the command line in processes of their own, without the seconds that its imports take.

A server process imports the command line once, starts no thread of jax, and forks for every run. The child
has the descriptors and the environment of that run, makes its standard streams as the interpreter does, and
ends as the interpreter ends.
"""

import array
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parent.parent.parent


@dataclass
class Run:
    """Exit code, as a shell shows it, and what was written to standard output and standard error."""

    exit_code: int
    out: bytes
    err: bytes


class ForkedCli:
    """The server, and the runs that it makes one at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.helpers.forked_cli", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=environment, cwd=ROOT,
            )  # fmt: skip

    def start(
        self, arguments: list[object], descriptors: dict[int, int | None], environment: dict[str, str]
    ) -> int:
        """Start a run, and return its process id; a descriptor that is None is closed."""
        given = {number: at for number, at in descriptors.items() if at is not None}
        request = {
            "arguments": [os.fsdecode(a if isinstance(a, bytes) else str(a)) for a in arguments],
            "numbers": list(given),
            "closed": [number for number, at in descriptors.items() if at is None],
            "environment": environment,
            "folder": os.getcwd(),
        }
        handles = array.array("i", given.values())
        self._socket.sendmsg(
            [json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handles)]
        )
        return int(self._socket.recv(32))

    def wait(self) -> int:
        """Return the exit code of the run that was started."""
        return int(self._socket.recv(32))

    def __call__(
        self,
        *arguments: object,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
        **descriptors: int | None,
    ) -> Run:
        """Run `qmoe`.

        Args:
            arguments: its arguments, str or bytes.
            stdin: what standard input holds.
            env: variables of the environment, besides those of the tests.
            descriptors: `out` and `err` where they are not to be read: a descriptor, or None to close it.
        """
        with open(os.memfd_create("stdin"), "wb+") as given:
            given.write(stdin)
            given.seek(0)
            read = {name: os.memfd_create(name) for name in ("out", "err") if name not in descriptors}
            used = {0: given.fileno()} | {
                number: read.get(name, descriptors.get(name)) for number, name in ((1, "out"), (2, "err"))
            }
            self.start(list(arguments), used, env or {})
            code = self.wait()
            written = {name: _content(at) for name, at in read.items()}
        return Run(code, written.get("out", b""), written.get("err", b""))

    def close(self) -> None:
        self._socket.close()
        self._server.wait(10)


def _content(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


def _serve(channel: socket.socket) -> dict | None:
    """Fork for every request; return it in the child, and None when the tests are over."""
    while True:
        handles = array.array("i")
        content, ancillary, *_ = channel.recvmsg(1 << 20, socket.CMSG_SPACE(4 * handles.itemsize))
        if not content:
            return None
        for _, _, data in ancillary:
            handles.frombytes(data)
        request = json.loads(content)
        if (child := os.fork()) == 0:
            channel.close()
            moved = [os.dup(handle) for handle in handles]
            for number, handle in zip(request["numbers"], moved, strict=True):
                os.dup2(handle, number)
            for handle in (*handles, *moved):
                os.close(handle)
            for number in request["closed"]:
                os.close(number)
            return request
        for handle in handles:
            os.close(handle)
        channel.send(str(child).encode())
        status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        channel.send(str(code if code >= 0 else 128 - code).encode())


def _stream(number: int, closed: list[int]) -> io.TextIOWrapper | None:
    if number in closed:
        return None
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    default = "backslashreplace" if number == 2 else "strict"
    return open(
        number,
        "r" if number == 0 else "w",
        encoding=encoding or "utf-8",
        errors=errors or default,
        closefd=False,
    )


if __name__ == "__main__":
    from qmoe_jax.cli import main

    server = socket.socket(fileno=int(sys.argv[1]))
    request = _serve(server)
    if request is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = ["qmoe", *request["arguments"]]
        sys.stdin, sys.stdout, sys.stderr = (_stream(number, request["closed"]) for number in range(3))
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
        main()
