"""Stores of files for tests: a local directory, tensorstore's memory and file drivers, a local S3 server."""

from __future__ import annotations

import contextlib
import http.server
import pathlib
import re
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import tensorstore as ts

from qmoe_jax.files.local_store import LocalStore
from qmoe_jax.files.location import Location
from qmoe_jax.files.object_store import ObjectStore

BUCKET = "bucket"


def object_store(spec: dict[str, Any], url: str) -> ObjectStore:
    """The objects of a tensorstore spec; `url` is what messages call it."""
    context = ts.Context()
    return ObjectStore(Location(url, ts.KvStore.open(spec, context=context).result(), context))


def memory_store() -> ObjectStore:
    return object_store({"driver": "memory", "path": "model/"}, "memory://model")


def file_driver_store(folder: pathlib.Path) -> ObjectStore:
    return object_store({"driver": "file", "path": f"{folder}/"}, "driver://model")


def s3_server() -> Iterator[str]:
    """Start a local S3 server with a bucket, which the environment names, and yield the bucket's URL."""
    server = pytest.importorskip(
        "moto.server", reason="moto[server] is not installed (the extra `test` has it)"
    )
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")).close()
        yield f"s3://{BUCKET}"
    running.stop()


class _Ranges(http.server.BaseHTTPRequestHandler):
    """Answers with files and ranges of them, as web servers do and Python's own does not; lists nothing."""

    root: pathlib.Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        file = self.root / self.path.lstrip("/")
        content = file.read_bytes() if file.is_file() else None
        status, body, headers = (404, b"", {}) if content is None else (200, content, {})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if content is not None and asked:
            begin, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            status, body = (206, content[begin : end + 1]) if begin < len(content) else (416, b"")
            place = f"{begin}-{end}" if status == 206 else "*"
            headers = {"Content-Range": f"bytes {place}/{len(content)}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if with_body else b"")

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def http_server(folder: pathlib.Path) -> Iterator[str]:
    """Yield the URL of a web server with a folder's files."""
    handler = type("Handler", (_Ranges,), {"root": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def copy_into(store: ObjectStore, folder: pathlib.Path) -> ObjectStore:
    """Copy the files of a folder into a store, which is returned."""
    local = LocalStore(folder)
    for name in local.names():
        store.write(name, [local.read(name)])
    return store
