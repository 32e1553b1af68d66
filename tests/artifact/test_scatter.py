"""Reads that scatter an expert to where it is used."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.artifact.scatter import ScatterRead
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.store import File


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scatter") / "file"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    return path


def scattered(file, offset, sizes):
    arrays = [np.zeros(size, np.uint8) for size in sizes]
    return arrays, ScatterRead(File.at(file), 1000, offset, tuple(array.data for array in arrays))


@settings(deadline=None, max_examples=60)
@given(
    offset=st.integers(0, 99),
    sizes=st.lists(st.integers(0, 150), min_size=1, max_size=6),
    parts=st.integers(1, 9),
)
def test_the_parts_read_what_the_whole_does(file, offset, sizes, parts):
    arrays, read = scattered(file, offset, sizes)
    split = list(read.split(parts))
    assert len(split) <= parts
    assert sum(part.size for part in split) == read.size == sum(sizes)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ScatterRead.run, split))
    assert np.concatenate(arrays).tobytes() == file.read_bytes()[offset:][: sum(sizes)]


def test_a_file_of_another_size_is_refused_by_name(file):
    _, read = scattered(file, 0, [10])
    with pytest.raises(CheckpointError, match=str(file)):
        dataclasses.replace(read, nbytes=999).run()


def test_a_missing_file_is_refused_by_name(file):
    _, read = scattered(file.with_name("gone"), 0, [10])
    with pytest.raises(CheckpointError, match="gone"):
        read.run()
