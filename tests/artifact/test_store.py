"""Writing of an artifact: the same bytes however often it is interrupted, and never over something else."""

import errno
import hashlib
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from qmoe_jax.artifact import ArtifactReader, CheckpointError, GroupKey, Kind, dequantize, verify
from qmoe_jax.files.tensor import in_memory
from tests.helpers import artifact_samples as samples
from tests.helpers.checkpoint_samples import add_strays

every_kind = pytest.mark.parametrize("kind", samples.KINDS.values(), ids=samples.KINDS)


def digests(root: pathlib.Path) -> dict[str, str]:
    """Of what must be the same in every run."""
    files = [
        root / "manifest.json",
        root / "run.json",
        *root.glob("*.safetensors"),
        *root.rglob("experts/*/*"),
    ]
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def start(root: pathlib.Path, wait: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, samples.__file__, str(root), str(wait)], stderr=subprocess.PIPE)


@every_kind
def test_two_runs_write_the_same_bytes(
    artifact_of: Callable[[Kind], pathlib.Path], tmp_path: pathlib.Path, kind: Kind
) -> None:
    samples.write_artifact(tmp_path, kind)
    assert digests(tmp_path) == digests(artifact_of(kind))


def test_a_killed_run_resumes_to_the_same_bytes(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    killed = tmp_path / "killed"
    kept: dict[pathlib.Path, int] = {}
    for enough in (2, 5):  # groups written when the process is killed
        process = start(killed, wait=0.3)
        while len(list(killed.rglob("experts/*/*"))) < enough:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with pytest.raises(CheckpointError, match="unfinished") as caught:
            ArtifactReader.open(killed)
        assert "run the same compression again" in str(caught.value)
        assert not verify(killed).ok
        for path, written in kept.items():
            assert path.stat().st_mtime_ns == written, "a finished group was written again"
        kept = {path: path.stat().st_mtime_ns for path in killed.rglob("experts/*/*.safetensors")}
        (killed / ".manifest.json.0.tmp").write_text("half-written")
        (killed / ".dense.partial").mkdir()
    samples.write_artifact(killed)
    assert digests(killed) == digests(whole)
    assert verify(killed).ok
    assert not [*killed.rglob("*tmp*"), *killed.rglob("*partial*")]


def test_a_resumed_run_reads_its_groups(tmp_path: pathlib.Path) -> None:
    experts = samples.random_experts(samples.KINDS["ternary"], "encoder", 1, 0, 2)
    with samples.writer(tmp_path) as artifact:
        assert not artifact.has_group("encoder", 1, 0, 2)
        artifact.write_group("encoder", 1, 0, experts)
    with samples.writer(tmp_path) as artifact:
        assert artifact.has_group("encoder", 1, 0, 2)
        assert not artifact.has_group("encoder", 1, 2, 4)
        for found, expected in zip(artifact.read_group("encoder", 1, 0, 2), experts, strict=True):
            np.testing.assert_array_equal(
                dequantize(found["wo"], samples.CODEBOOKS), dequantize(expected["wo"], samples.CODEBOOKS)
            )


def test_two_hosts_write_one_artifact(
    artifact_of: Callable[[Kind], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    kind = samples.KINDS["2 bits"]
    root = tmp_path / "together"
    with samples.writer(root, kind, host=0) as first, samples.writer(root, kind, host=1) as second:
        for artifact, (stack, layer) in zip((first, second), samples.LAYERS, strict=True):
            for begin, end in samples.GROUPS:
                experts = samples.random_experts(kind, stack, layer, begin, end)
                artifact.write_group(stack, layer, begin, experts)
        first.attach("tokenizer.model", b"pieces")
        first.write_dense(samples.dense_tensors())
        first.finish({"loss": 4.25})
    assert digests(root) == digests(artifact_of(kind))
    assert verify(root).ok


def test_finishing_an_artifact_twice_changes_no_byte(tmp_path: pathlib.Path) -> None:
    samples.write_artifact(tmp_path)
    before = digests(tmp_path)
    samples.write_artifact(tmp_path)
    assert digests(tmp_path) == before
    assert verify(tmp_path).ok


def test_opening_a_finished_artifact_to_write_leaves_it_finished(tmp_path: pathlib.Path) -> None:
    samples.write_artifact(tmp_path)
    with samples.writer(tmp_path) as artifact:
        assert artifact.finished
        artifact.attach("tokenizer.model", b"pieces")
    assert verify(tmp_path).ok
    with samples.writer(tmp_path) as artifact:
        with pytest.warns(UserWarning, match=r"tokenizer\.model: is missing or not this run's"):
            artifact.attach("tokenizer.model", b"other pieces")
        assert not artifact.finished


def test_a_directory_with_something_else_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("chapter one")
    with pytest.raises(CheckpointError, match="holds something else") as caught:
        samples.writer(tmp_path)
    assert "thesis.tex" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_artifact_of_another_run_is_refused_by_the_setting(tmp_path: pathlib.Path) -> None:
    samples.writer(tmp_path, damping=0.1).close()
    with pytest.raises(CheckpointError, match="another run") as caught:
        samples.writer(tmp_path, damping=0.2)
    assert "expected: options.damping=0.2" in str(caught.value)
    assert "found: options.damping=0.1" in str(caught.value)


def test_a_group_of_another_run_is_refused(tmp_path: pathlib.Path) -> None:
    samples.write_artifact(tmp_path / "other", samples.KINDS["ternary, groups"])
    path = "experts/encoder.layers_01/experts-00000-00001.safetensors"
    with samples.writer(tmp_path / "ours") as artifact:
        (tmp_path / "ours" / path).parent.mkdir(parents=True)
        (tmp_path / "ours" / path).write_bytes((tmp_path / "other" / path).read_bytes())
        assert artifact.has_group("encoder", 1, 0, 2), "the same run: only the packing differs"
    with samples.writer(tmp_path / "third", damping=0.3) as artifact:
        (tmp_path / "third" / path).parent.mkdir(parents=True)
        (tmp_path / "third" / path).write_bytes((tmp_path / "other" / path).read_bytes())
        with pytest.raises(CheckpointError, match="belongs to another run"):
            artifact.has_group("encoder", 1, 0, 2)


def test_a_damaged_group_is_refused_when_a_run_resumes(tmp_path: pathlib.Path) -> None:
    """Before there is a manifest nothing else says what the file must be: every byte counts."""
    with samples.writer(tmp_path) as artifact:
        experts = samples.random_experts(samples.KINDS["ternary"], "encoder", 1, 0, 1)
        artifact.write_group("encoder", 1, 0, experts)
    (path,), rng = tmp_path.rglob("experts/*/*"), random.Random(0)
    original = path.read_bytes()
    for position in range(0, len(original), 5):
        broken = bytearray(original)
        broken[position] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with samples.writer(tmp_path) as artifact, pytest.raises(CheckpointError) as caught:
            artifact.has_group("encoder", 1, 0, 1)
        assert path.name in str(caught.value)


def test_a_second_writer_of_the_same_directory_is_refused(tmp_path: pathlib.Path) -> None:
    with samples.writer(tmp_path), pytest.raises(CheckpointError, match="another process") as caught:
        samples.writer(tmp_path)
    assert f"process {os.getpid()} on" in str(caught.value)
    samples.writer(tmp_path).close()


def test_the_lock_is_one_file_for_all_writers(tmp_path: pathlib.Path) -> None:
    """Were it removed on closing, one that opened it before and one that comes later would hold two locks."""
    samples.writer(tmp_path).close()
    before = (tmp_path / ".lock-0").stat().st_ino
    samples.writer(tmp_path).close()
    assert (tmp_path / ".lock-0").stat().st_ino == before


def test_an_artifact_with_missing_experts_cannot_be_finished(tmp_path: pathlib.Path) -> None:
    kind = samples.KINDS["ternary"]
    with samples.writer(tmp_path) as artifact:
        with pytest.raises(CheckpointError, match="no dense parameters"):
            artifact.finish()
        artifact.write_dense(samples.dense_tensors())
        for stack, layer in samples.LAYERS:
            for begin, end in samples.GROUPS[1:]:
                experts = samples.random_experts(kind, stack, layer, begin, end)
                artifact.write_group(stack, layer, begin, experts)
        with pytest.raises(CheckpointError, match="experts are missing") as caught:
            artifact.finish()
        assert "expected: expert 0 first" in str(caught.value)
        for stack, layer in samples.LAYERS:
            artifact.write_group(stack, layer, 0, samples.random_experts(kind, stack, layer, 0, 2))
        artifact.write_group("encoder", 1, 3, samples.random_experts(kind, "encoder", 1, 3, 5))
        with pytest.raises(CheckpointError, match="experts are there twice"):
            artifact.finish()
        assert not artifact.finished


def test_experts_that_do_not_fit_the_run_are_refused(tmp_path: pathlib.Path) -> None:
    experts = samples.random_experts(samples.KINDS["ternary"], "encoder", 1, 0, 2)
    with samples.writer(tmp_path, samples.KINDS["2 bits"]) as artifact:
        with pytest.raises(CheckpointError, match="needs a codebook that the run lacks"):
            artifact.write_group("encoder", 1, 0, experts)
        with pytest.raises(CheckpointError, match="matrices of other shapes"):
            artifact.write_group("encoder", 1, 0, [{"wi": expert["wi"]} for expert in experts])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_foreign_file_keeps_an_artifact_from_being_finished(artifact: pathlib.Path) -> None:
    (artifact / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt: is not part of the artifact"):
        samples.write_artifact(artifact)


def test_groups_of_one_layer_must_have_one_kind(tmp_path: pathlib.Path) -> None:
    with samples.writer(tmp_path) as artifact:
        artifact.write_dense(samples.dense_tensors())
        for kind, (start, stop) in zip(("ternary", "2 bits", "ternary"), samples.GROUPS, strict=True):
            experts = samples.random_experts(samples.KINDS[kind], "encoder", 1, start, stop)
            artifact.write_group("encoder", 1, start, experts)
        with pytest.raises(CheckpointError, match="packed differently from its layer"):
            artifact.finish()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: pathlib.Path) -> None:
    experts = samples.random_experts(samples.KINDS["ternary"], "encoder", 1, 0, 2)
    with samples.writer(tmp_path) as artifact:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes a file may have
        try:
            with pytest.raises(CheckpointError, match=r"experts-00000-00001\.safetensors: cannot be written"):
                artifact.write_group("encoder", 1, 0, experts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not artifact.has_group("encoder", 1, 0, 2)


def test_a_disk_without_room_for_dense_parameters_is_told_before_orbax_writes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with samples.writer(tmp_path) as artifact:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            CheckpointError, match=r"dense: cannot be written(.|\n)*No space(.|\n)*remedy: free"
        ):
            artifact.write_dense({"a": in_memory(np.zeros(1000, np.float32))})
        assert not list(tmp_path.glob("dense*"))


def test_strays_do_not_keep_an_artifact_from_being_begun_resumed_and_finished(tmp_path: pathlib.Path) -> None:
    add_strays(tmp_path)
    samples.writer(tmp_path).close()
    (tmp_path / "experts").mkdir()
    add_strays(tmp_path)
    samples.write_artifact(tmp_path)
    assert verify(tmp_path).problems == ()


def test_an_artifact_in_a_directory_whose_name_is_not_utf8(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "a b#\nmod\udce9le"
    samples.write_artifact(root)
    assert verify(root).problems == ()


def test_a_layer_can_be_linked_to_the_files_of_another(tmp_path: pathlib.Path) -> None:
    (stack, layer), other = samples.LAYERS
    with samples.writer(tmp_path) as artifact:
        for start, stop in samples.GROUPS:
            key = GroupKey(stack, layer, start, stop)
            with pytest.raises(ValueError, match="expected a group that was written"):
                artifact.link_group(*other, key)
            experts = samples.random_experts(samples.KINDS["ternary"], stack, layer, start, stop)
            artifact.write_group(stack, layer, start, experts)
            artifact.link_group(*other, key)
        artifact.write_dense(samples.dense_tensors())
        artifact.finish()
    assert verify(tmp_path).ok
    reader = ArtifactReader.open(tmp_path)
    for expert in range(samples.CONFIG.num_experts):
        extents = [reader.expert_extent(*place, expert) for place in samples.LAYERS]
        assert extents[0].path == extents[1].path
        assert extents[0].read() == extents[1].read()
