"""A compression to an object store: resumable, the bytes of a local one, and a model that runs from there."""

import pathlib

import jax
import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.compression.finished import FOLDER
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.object_store import ObjectStore
from qmoe_jax.files.store import open_store

CONFIG = qj.CompressionConfig(sentinel_start=480, method="nearest", experts_per_group=4)
VARYING = ("dense/", "report.json", "SHA256SUMS")


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


GROUP = "experts/decoder.layers_01/experts-00000-00003"
MOMENTS = (f"{FOLDER}/{GROUP}.safetensors", GROUP, f"{FOLDER}/{GROUP}.json", "report.json", "SHA256SUMS")
"""Beginnings of the names of objects after which a run is killed, in the order in which they are written."""


def kill_after(patch: pytest.MonkeyPatch, moment: str) -> None:
    write = ObjectStore.write

    def write_and_die(self: ObjectStore, name: str, *arguments: object, **options: object) -> object:
        result = write(self, name, *arguments, **options)
        if name.startswith(moment):
            raise Killed
        return result

    patch.setattr(ObjectStore, "write", write_and_die)


@pytest.fixture(scope="module")
def run(data, samples):
    def compress(output, **options):
        return qj.compress(data / "hf_tiny_a", output, samples[:2], CONFIG, **options)

    return compress


@pytest.fixture(scope="module")
def local(run, tmp_path_factory):
    """The artifact on a disk, not to be changed."""
    run(path := tmp_path_factory.mktemp("local") / "model")
    return path


def contents(place) -> dict[str, bytes]:
    store = open_store(place)
    return {name: store.read(name) for name in store.names() if not name.startswith((*VARYING, "."))}


def test_a_killed_compression_resumes_in_an_object_store_to_the_bytes_of_a_local_one(
    run, local: pathlib.Path, s3_url: str, tmp_path: pathlib.Path, samples
) -> None:
    there = open_store(s3_url)
    for moment in MOMENTS:
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, moment)
            with pytest.raises(Killed):
                run(s3_url, scratch=tmp_path)
        assert any(name.startswith(moment) for name in there.names())
        with pytest.raises(CheckpointError, match="is unfinished"):
            qj.open_checkpoint(s3_url)

    report = run(s3_url, scratch=tmp_path)

    assert report.path == s3_url
    assert contents(s3_url) == contents(local)
    assert there.names(FOLDER) == []
    assert list(tmp_path.iterdir()) == []
    assert qj.verify(s3_url).problems == ()
    assert qj.inspect(s3_url).bytes_on_disk == qj.inspect(local).bytes_on_disk
    batch = tuple(part[None] for part in samples[0])
    model, params = qj.load_compressed(local)
    apply = jax.jit(model.apply)
    expected = np.asarray(apply({"params": params}, *batch))
    _, params = qj.load_compressed(s3_url)
    np.testing.assert_array_equal(apply({"params": params}, *batch), expected)


def test_a_compression_to_a_url_needs_a_local_scratch_folder(run, s3_url: str) -> None:
    with pytest.raises(CheckpointError, match=r"scratch files(.|\n)*--scratch"):
        run(s3_url)
    assert open_store(s3_url).names() == []
