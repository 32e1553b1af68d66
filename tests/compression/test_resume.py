"""Resumption: after a kill at any moment, or damage to any file, the same bytes; never with other inputs."""

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import warnings

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.compression.finished import FOLDER
from qmoe_jax.compression.passes.attention import AttentionPass
from qmoe_jax.compression.passes.experts import ExpertPass
from qmoe_jax.compression.producer import this_producer
from qmoe_jax.files.tensor import in_memory

CONFIG = qj.CompressionConfig(sentinel_start=480, method="nearest", experts_per_group=4)
GROUP = "experts/encoder.layers_03/experts-00000-00003.safetensors"
LEVELS, RECORD = f"{FOLDER}/{GROUP}", f"{FOLDER}/{GROUP}".replace("safetensors", "json")
ATTACHED = {"tokenizer.model": b"pieces"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.fixture(scope="module")
def run(data, samples):
    """Compress the tiny model into a directory."""

    def compress(output, checkpoint=data / "hf_tiny_a", **options):
        return qj.compress(checkpoint, output, samples[:2], CONFIG, attachments=ATTACHED, **options)

    return compress


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """A whole artifact, not to be changed."""
    run(path := tmp_path_factory.mktemp("undisturbed") / "model")
    return path


def kill_at(monkeypatch, name: str, moment: str) -> None:
    """Kill the run when the file whose path ends with `name` takes its place, before it does or after."""
    real = os.replace

    def replace(source, target):
        if moment == "after":
            real(source, target)
        if str(target).endswith(name):
            raise Killed
        if moment == "before":
            real(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.fixture(scope="module")
def unfinished(run, tmp_path_factory):
    """A run that was killed when half of its groups were finished, not to be changed."""
    path = tmp_path_factory.mktemp("unfinished") / "model"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, RECORD.replace("encoder", "decoder"), "before")
        with pytest.raises(Killed):
            run(path)
    return path


def content(root: pathlib.Path) -> dict[str, object]:
    """Of every file: its bytes, but for times and what Orbax writes."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    found: dict[str, object] = {
        name: path.read_bytes()
        for name, path in files.items()
        if not name.startswith(("dense/", ".lock")) and name not in ("SHA256SUMS", "report.json")
    }
    report = json.loads(files["report.json"].read_bytes())
    del report["checksum"], report["pipeline"]
    for timed in (report, *report["groups"]):
        del timed["seconds"]
    return found | {"report.json": report}


def resume_with_warnings(run, path) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(path)
    return "\n".join(str(warning.message) for warning in caught)


def test_two_runs_differ_only_in_times(run, undisturbed, tmp_path):
    run(tmp_path / "model")
    assert content(tmp_path / "model") == content(undisturbed)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "name",
    [
        "/run.json",
        "tokenizer.model",
        "model/dense",
        "encoder.layers_01.routed/host-0-of-1.index",
        "encoder.layers_01.computed/group-00001.index",
        "encoder.final/host-0-of-1.index",
        "decoder.layers_03.routed/host-0-of-1.index",
        LEVELS,
        f"model/{GROUP}",
        RECORD,
        "/report.json",
        "/SHA256SUMS",
        "/manifest.json",
    ],
)
def test_a_run_that_was_killed_resumes_to_the_same_bytes(
    run, undisturbed, tmp_path, monkeypatch, name, moment
):
    path = tmp_path / "model"
    with monkeypatch.context() as patch:
        kill_at(patch, name, moment)
        with pytest.raises(Killed):
            run(path)
    if (path / "run.json").exists():
        (path / ".scratch" / "qmoe-of-another-run" / "staging-0").mkdir(parents=True, exist_ok=True)
    run(path)
    assert content(path) == content(undisturbed)
    assert qj.verify(path).ok
    assert not [entry.name for entry in path.glob(".*") if not entry.name.startswith(".lock")]


def test_a_full_disk_loses_nothing(run, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises((qj.CheckpointError, OSError), match="No space"):
            run(tmp_path / "model")
    run(tmp_path / "model")
    assert content(tmp_path / "model") == content(undisturbed)


def flip(path: pathlib.Path) -> None:
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 2] ^= 4
    path.write_bytes(broken)


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": pathlib.Path.unlink,
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@damages
@pytest.mark.parametrize("name", [GROUP, LEVELS, RECORD])
def test_damage_to_an_unfinished_run_is_named_and_made_good(
    run, undisturbed, unfinished, tmp_path, name, damage
):
    path = pathlib.Path(shutil.copytree(unfinished, tmp_path / "model"))
    shutil.rmtree(path / ".scratch")  # so that the levels are needed
    damage(path / name)
    told = resume_with_warnings(run, path)
    if (name, damage) != (RECORD, pathlib.Path.unlink):  # then it was killed before it wrote the record
        assert str(path / name) in told
        assert "quantized again" in told
    assert content(path) == content(undisturbed)


@damages
@pytest.mark.parametrize("name", [GROUP, "run.json", "codebooks.safetensors", "report.json", "manifest.json"])
def test_damage_to_a_finished_artifact_is_named_and_made_good(run, undisturbed, tmp_path, name, damage):
    path = pathlib.Path(shutil.copytree(undisturbed, tmp_path / "model"))
    damage(path / name)
    found = qj.verify(path)
    assert any(name in problem for problem in found.problems)
    assert "run the compression" in (found.remedy or "")
    told = resume_with_warnings(run, path)
    if (name, damage) != ("manifest.json", pathlib.Path.unlink):  # without it the artifact is unfinished
        assert name in told
    assert content(path) == content(undisturbed)
    assert qj.verify(path).ok


def test_a_run_goes_on_from_its_hidden_states(run, undisturbed, unfinished, tmp_path, monkeypatch):
    path = pathlib.Path(shutil.copytree(unfinished, tmp_path / "model"))
    flip(path / LEVELS)  # of a layer that is behind it: they are not needed
    stacks = []
    attend = AttentionPass.run
    monkeypatch.setattr(
        AttentionPass, "run", lambda self, states: stacks.append(self.stack) or attend(self, states)
    )
    assert resume_with_warnings(run, path) == ""
    assert content(path) == content(undisturbed)
    assert not stacks, "it was killed behind the last attention pass"


@damages
@pytest.mark.parametrize("name", ["host-0-of-1", "host-0-of-1.index"])
@pytest.mark.parametrize("store", ["encoder.final", "decoder.layers_03.routed"])
def test_damaged_hidden_states_are_computed_again(
    run, undisturbed, unfinished, tmp_path, name, store, damage
):
    path = pathlib.Path(shutil.copytree(unfinished, tmp_path / "model"))
    (damaged,) = (path / ".scratch").glob(f"*/{store}/{name}")
    damage(damaged)
    told = resume_with_warnings(run, path)
    if damage not in (
        pathlib.Path.unlink,
        DAMAGES["longer"],
    ):  # what is missing, or beyond the end, is not read
        assert str(damaged) in told
    assert content(path) == content(undisturbed)


def test_damaged_dense_parameters_are_written_again_without_quantizing(
    run, undisturbed, tmp_path, monkeypatch
):
    path = pathlib.Path(shutil.copytree(undisturbed, tmp_path / "model"))
    flip(path / "dense" / "manifest.ocdbt")
    monkeypatch.setattr(ExpertPass, "_quantize", None)
    assert "dense/manifest.ocdbt" in resume_with_warnings(run, path)
    assert qj.verify(path).ok


def with_experts(data, change):
    """Return the tiny model, opened, with the last expert matrix of the decoder changed."""
    reader, name = qj.open_checkpoint(data / "hf_tiny_a"), "decoder/layers_3/mlp/expert/wo/kernel"
    array = reader.read(name)
    change(array)
    return dataclasses.replace(reader, tensors={**reader.tensors, name: in_memory(array)})


def test_an_expert_that_changed_is_refused_on_resuming(data, run, unfinished, tmp_path):
    path = pathlib.Path(shutil.copytree(unfinished, tmp_path / "model"))

    def change(array):
        array[5, -1, -1] = np.nextafter(array[5, -1, -1], np.float32(9))

    with pytest.raises(qj.CheckpointError, match=r"expected: source\.checkpoint\.experts='"):
        run(path, with_experts(data, change))
    assert run(path, with_experts(data, lambda array: None)).path == path, "a copy is the same checkpoint"


def test_another_producer_is_refused_and_recorded_when_allowed(run, unfinished, tmp_path, monkeypatch):
    path = pathlib.Path(shutil.copytree(unfinished, tmp_path / "model"))
    module = importlib.import_module("qmoe_jax.compression.compress")  # the package exports its function
    monkeypatch.setattr(module, "this_producer", lambda: this_producer() | {"jax": "9.9"})
    with pytest.raises(qj.CheckpointError, match="by other software or on another machine") as caught:
        run(path)
    assert caught.value.found == "jax '9.9'"
    assert "--allow-mixed" in caught.value.remedy
    report = run(path, allow_mixed=True)
    assert [fields["jax"] == "9.9" for fields in report.producers] == [False, True]
    assert {group.layer_name for group in report.groups if group.producer["jax"] == "9.9"} == {"decoder 3"}
    assert qj.verify(path).ok


def test_a_finished_artifact_is_rid_of_what_a_killed_run_left(run, undisturbed, unfinished, tmp_path):
    path = pathlib.Path(shutil.copytree(undisturbed, tmp_path / "model"))
    shutil.copytree(unfinished / FOLDER, path / FOLDER)
    (path / ".scratch" / "qmoe-1").mkdir(parents=True)
    (path / ".manifest.json.0.tmp").write_bytes(b"half")
    run(path)
    assert content(path) == content(undisturbed)
    assert not [entry.name for entry in path.glob(".*") if not entry.name.startswith(".lock")]
