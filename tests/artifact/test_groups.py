"""The file of an expert group: valid safetensors, one contiguous range per expert."""

import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors.flax

from qmoe_jax.artifact import CheckpointError, GroupKey, Kind, pack_matrix
from qmoe_jax.artifact.groups import GroupFile, render_group
from qmoe_jax.files.durable import write_durably
from tests.helpers import artifact_samples as samples

KEY = GroupKey("encoder", 1, 2, 4)
every_kind = pytest.mark.parametrize("kind", samples.KINDS.values(), ids=samples.KINDS)


def write_group(root: pathlib.Path, kind: Kind) -> list:
    experts = samples.random_experts(kind, KEY.stack, KEY.layer, KEY.start, KEY.stop)
    write_durably(root / KEY.path, render_group(KEY, experts, "the run"))
    return experts


@every_kind
def test_the_safetensors_library_reads_a_group_file(tmp_path: pathlib.Path, kind: Kind) -> None:
    experts = write_group(tmp_path, kind)
    found = safetensors.flax.load_file(tmp_path / KEY.path)
    expected = {
        f"{number}.{matrix}.{part}": array
        for number, expert in enumerate(experts, KEY.start)
        for matrix, packed in expert.items()
        for part, array in packed.parts.items()
    }
    assert {name for name in found if not name.endswith(".padding")} == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(np.asarray(found[name]), array)


@every_kind
def test_an_expert_is_one_aligned_range(tmp_path: pathlib.Path, kind: Kind) -> None:
    experts = write_group(tmp_path, kind)
    group, data = GroupFile.open(tmp_path, KEY), (tmp_path / KEY.path).read_bytes()
    position = group.data_begin
    for number, expert in enumerate(experts, KEY.start):
        extent = group.extent(number)
        assert extent.offset == position
        assert extent.offset % 16 == 0
        position += extent.nbytes
        parsed = extent.parse(data[extent.offset : extent.offset + extent.nbytes])
        assert extent.read() == data[extent.offset : extent.offset + extent.nbytes]
        for name, packed in expert.items():
            assert (parsed[name].kind, parsed[name].shape) == (packed.kind, packed.shape)
            for part, array in packed.parts.items():
                np.testing.assert_array_equal(parsed[name].parts[part], array)
                assert parsed[name].parts[part].flags.aligned
    assert position == len(data) == group.nbytes


def test_codeword_counts_have_one_dtype_throughout_a_group(tmp_path: pathlib.Path) -> None:
    """A row of 300 codewords in one expert makes the counts of all 16-bit."""
    rng, kind = np.random.default_rng(0), samples.KINDS["ternary"]
    digits = [rng.choice(3, (2, 900), p=p).astype(np.uint8) for p in ([0.9, 0.05, 0.05], [0.1, 0.4, 0.5])]
    levels = np.ones((2, 1, 2), np.float32)
    experts = [{"wi": pack_matrix(kind, each, levels, samples.CODEBOOKS)} for each in digits]
    assert [expert["wi"].parts["counts"].dtype for expert in experts] == [np.uint8, np.uint16]
    write_durably(tmp_path / KEY.path, render_group(KEY, experts, "the run"))
    read = GroupFile.open(tmp_path, KEY).read(KEY.start, KEY.stop)
    for expert, found in zip(experts, read, strict=True):
        assert found["wi"].parts["counts"].dtype == np.uint16
        np.testing.assert_array_equal(found["wi"].parts["counts"], expert["wi"].parts["counts"])


def test_experts_packed_in_different_ways_are_refused() -> None:
    experts = [samples.random_experts(kind, *("encoder", 1, 0, 1))[0] for kind in samples.KINDS.values()][:2]
    with pytest.raises(ValueError, match="packed in one way"):
        render_group(KEY, experts, "the run")


def test_the_path_of_a_group_file_names_its_experts() -> None:
    assert KEY.path == "experts/encoder.layers_01/experts-00002-00003.safetensors"
    assert GroupKey.from_path(KEY.path) == KEY
    assert GroupKey.from_path("experts/encoder.layers_1/experts-00002-00003.safetensors") is None
    assert GroupKey.from_path("experts/notes.txt") is None


def test_reading_an_expert_of_a_file_that_shrank_is_an_error(tmp_path: pathlib.Path) -> None:
    write_group(tmp_path, samples.KINDS["ternary"])
    extent = GroupFile.open(tmp_path, KEY).extent(3)
    os.truncate(tmp_path / KEY.path, extent.offset + 5)
    with pytest.raises(CheckpointError, match="cut short") as caught:
        extent.read()
    message = str(caught.value)
    assert KEY.path in message
    assert f"expected: at least {extent.offset + extent.nbytes} bytes" in message
    assert f"found: {extent.offset + 5} bytes" in message


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1], ids=lambda size: f"{size} bytes")
def test_a_truncated_group_file_does_not_open(tmp_path: pathlib.Path, size: int) -> None:
    write_group(tmp_path, samples.KINDS["ternary"])
    path = tmp_path / KEY.path
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(CheckpointError, match="cut short"):
        GroupFile.open(tmp_path, KEY)


def test_files_that_are_not_group_files_do_not_open(tmp_path: pathlib.Path) -> None:
    path = tmp_path / KEY.path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else altogether")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        GroupFile.open(tmp_path, KEY)
    safetensors.flax.save_file({"weight": jax.numpy.ones(3)}, path)
    with pytest.raises(CheckpointError, match="not an expert group of this version"):
        GroupFile.open(tmp_path, KEY)


def test_a_group_file_in_the_place_of_another_does_not_open(tmp_path: pathlib.Path) -> None:
    write_group(tmp_path, samples.KINDS["ternary"])
    other = GroupKey("encoder", 1, 0, 2)
    (tmp_path / KEY.path).rename(tmp_path / other.path)
    with pytest.raises(CheckpointError, match="holds other experts"):
        GroupFile.open(tmp_path, other)
