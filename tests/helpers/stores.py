"""Stores of files for tests: a local directory, tensorstore's memory and file drivers, a local S3 server."""

from __future__ import annotations

import pathlib
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import tensorstore as ts

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
