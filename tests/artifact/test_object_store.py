"""An artifact in an object store: the files of a local one, resumed after any kill, never mixed up."""

import pathlib
from contextlib import nullcontext
from typing import Any

import pytest

from qmoe_jax.artifact import ArtifactReader, is_artifact, measure, open_checkpoint, verify
from qmoe_jax.artifact.manifest import canonical
from qmoe_jax.artifact.open import artifact_root
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.object_store import ObjectStore
from qmoe_jax.files.store import LocalStore, Store, open_store
from tests.helpers import artifact_samples as samples
from tests.helpers.stores import file_driver_store, http_server, memory_store

GROUP = "experts/encoder.layers_01/experts-00002-00003.safetensors"
VARYING = ("dense/", "report.json", "SHA256SUMS")


def contents(store: Store) -> dict[str, bytes]:
    """Every file that is the same in every run."""
    return {name: store.read(name) for name in store.names() if not name.startswith((*VARYING, "."))}


@pytest.fixture(params=["memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_url"))
    return memory_store() if request.param == "memory" else file_driver_store(tmp_path)


def test_an_artifact_has_the_same_files_wherever_it_lies(whole: pathlib.Path, store: Store) -> None:
    samples.write_artifact(store)
    assert contents(store) == contents(LocalStore(whole))
    result = verify(store)
    assert result.problems == ()
    assert result.files == len(store.names()) - 1
    sizes, local = measure(store), measure(whole)
    assert (sizes.expert_parts, sizes.codebook_bytes) == (local.expert_parts, local.codebook_bytes)


def test_an_artifact_reads_the_same_wherever_it_lies(whole: pathlib.Path) -> None:
    samples.write_artifact(store := memory_store())
    there, local = ArtifactReader.open(store), ArtifactReader.open(whole)
    there.require_whole()
    assert there.path == "memory://model"
    for name in local.names():
        assert (there.read(name) == local.read(name)).all(), name


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


class KilledStore(ObjectStore):
    """The objects of another store, whose user is killed after `left` changes."""

    def __init__(self, store: ObjectStore, left: int):
        self.__dict__.update(vars(store))
        self.left = left

    def _spend(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    def write(self, *arguments: Any, **options: Any) -> Any:
        result = super().write(*arguments, **options)
        self._spend()
        return result

    def delete(self, *arguments: Any) -> None:
        super().delete(*arguments)
        self._spend()

    def delete_folder(self, *arguments: Any) -> None:
        super().delete_folder(*arguments)
        self._spend()


def test_a_run_killed_after_any_change_resumes_to_the_same_bytes(whole: pathlib.Path) -> None:
    """Each run resumes what those before it left, and is killed where none of them was."""
    store, seen, left = memory_store(), set(), 1
    while True:
        try:
            samples.write_artifact(KilledStore(store, left))
            break
        except Killed:
            state = len(store.names("dense")), *contents(store)  # Orbax gives its files random names
            left += state in seen
            seen.add(state)
            if not store.exists("manifest.json"):
                with pytest.raises(CheckpointError, match="unfinished"):
                    ArtifactReader.open(store)
    assert len(seen) > 12
    assert contents(store) == contents(LocalStore(whole))
    assert verify(store).problems == ()


@pytest.mark.parametrize("damage", ["flipped", "cut short", "missing"])
@pytest.mark.parametrize("name", [GROUP, "codebooks.safetensors", "manifest.json", "run.json"])
def test_damage_is_named_and_made_again(name: str, damage: str) -> None:
    samples.write_artifact(store := memory_store())
    before = contents(store)
    changed = {"flipped": bytes([*before[name][:-9], before[name][-9] ^ 1, *before[name][-8:]])}
    changed["cut short"] = before[name][:-5]
    store.delete(name)
    if damage in changed:
        store.write(name, [changed[damage]])
    problems = verify(store).problems
    assert any(name in problem for problem in problems)
    if (name, damage) == (GROUP, "flipped"):
        with samples.writer(store) as writer, pytest.raises(CheckpointError, match="is damaged"):
            writer.has_group("encoder", 1, 2, 4)
    with pytest.warns(UserWarning, match="written again") if name[0] in "cr" else nullcontext():
        repair(store)
    assert contents(store) == before
    assert verify(store).problems == ()


def repair(store: Store) -> None:
    """Write all groups, whether they are there or not."""
    kind = samples.KINDS["ternary"]
    with samples.writer(store) as artifact:
        artifact.attach("tokenizer.model", b"pieces")
        for stack, layer in samples.LAYERS:
            for start, stop in samples.GROUPS:
                artifact.write_group(
                    stack, layer, start, samples.random_experts(kind, stack, layer, start, stop)
                )
        artifact.write_dense(samples.dense_tensors())
        artifact.finish({"loss": 4.25})


def test_two_processes_of_one_run_make_one_artifact(whole: pathlib.Path) -> None:
    store, kind = memory_store(), samples.KINDS["ternary"]
    with samples.writer(store) as first, samples.writer(store) as second:
        for writer in (first, second):
            for stack, layer in samples.LAYERS:
                for start, stop in samples.GROUPS:
                    writer.write_group(
                        stack, layer, start, samples.random_experts(kind, stack, layer, start, stop)
                    )
            writer.attach("tokenizer.model", b"pieces")
        for writer in (first, second):
            writer.write_dense(samples.dense_tensors())
            writer.finish({"loss": 4.25})
    assert contents(store) == contents(LocalStore(whole))
    assert verify(store).problems == ()


def test_a_group_with_other_bytes_is_an_error_that_names_it() -> None:
    """A process that the local lock would have kept out, on a machine that computes other digits."""
    store, kind = memory_store(), samples.KINDS["ternary"]
    with samples.writer(store) as first, samples.writer(store) as second:
        first.write_group("encoder", 1, 2, samples.random_experts(kind, "encoder", 1, 2, 4))
        theirs = store.read(GROUP)
        with pytest.raises(CheckpointError, match="is there already, with other bytes") as caught:
            second.write_group("encoder", 1, 2, samples.random_experts(kind, "decoder", 0, 2, 4))
    assert caught.value.path == store.path(GROUP)
    assert store.read(GROUP) == theirs


def test_two_runs_cannot_begin_at_one_url() -> None:
    store = memory_store()
    with samples.writer(store), pytest.raises(CheckpointError, match="another run") as caught:
        samples.writer(store, damping=0.5)
    assert "options.damping=0.5" in str(caught.value)


def test_a_run_that_another_replaced_is_not_finished() -> None:
    store = memory_store()
    samples.write_artifact(store)
    store.delete("manifest.json")
    with samples.writer(store) as writer:
        for stack, layer in samples.LAYERS:
            for start, stop in samples.GROUPS:
                assert writer.has_group(stack, layer, start, stop)
        writer.write_dense(samples.dense_tensors())
        writer.attach("tokenizer.model", b"pieces")
        store.delete("run.json")
        store.write("run.json", [canonical(samples.writer(memory_store(), damping=0.5).run.to_json())])
        with pytest.raises(CheckpointError, match="another run"):
            writer.finish()
    assert not store.exists("manifest.json")


def test_a_url_that_holds_something_else_is_refused() -> None:
    (store := memory_store()).write("notes.txt", [b"notes"])
    with pytest.raises(CheckpointError, match="holds something else"):
        samples.writer(store)


def test_an_artifact_is_found_by_its_url_or_a_file_in_it(s3_url: str) -> None:
    samples.write_artifact(s3_url)
    assert is_artifact(s3_url)
    assert artifact_root(f"{s3_url}/manifest.json") == s3_url
    for url in (s3_url, f"{s3_url}/", f"{s3_url}/manifest.json"):
        assert open_checkpoint(url).path == s3_url
    assert not is_artifact(f"{s3_url}/dense")
    (store := open_store(s3_url)).delete("manifest.json")
    with pytest.raises(CheckpointError, match="is unfinished"):
        open_checkpoint(s3_url)
    store.delete(GROUP)
    assert verify(s3_url).problems


def test_an_artifact_is_read_over_http(whole: pathlib.Path) -> None:
    """A server that lists nothing: the files that SHA256SUMS names are checked."""
    with http_server(whole) as url:
        result = verify(url)
        assert open_checkpoint(url).path == url
    assert result.problems == ()
    assert result.files == verify(whole).files
