"""Finding a checkpoint: the newest whole step, an item, or the file by which it is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from qmoe_jax.artifact import open_checkpoint
from qmoe_jax.checkpoints import CheckpointError, open_dense
from qmoe_jax.checkpoints.t5x import write_parameters
from qmoe_jax.files.location import Location, Unreadable
from tests.helpers.checkpoint_samples import (
    DATA,
    EXPERTS,
    LAYOUTS,
    TINY,
    TINY_TIED,
    Parameters,
    nested,
    random_parameters,
)

CHUNK = f"target.{EXPERTS.replace('/', '.')}/0.0.0"
OLD = random_parameters()
NEW = {name: array + 1 for name, array in OLD.items()}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two_steps")
    write_parameters(nested(OLD), run, step=900)
    write_parameters(nested(NEW), run, step=2000)
    return run


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
    """A run with the steps 900 and 2000."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def holds(path: str | Path, parameters: Parameters) -> bool:
    return open_dense(path).read(EXPERTS).tobytes() == parameters[EXPERTS].tobytes()


def emptied(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def with_temporary_files_only(step: Path) -> None:
    emptied(step)
    (step / "checkpoint.tmp").touch()


def without_index(step: Path) -> None:
    (step / "checkpoint").unlink()


def cut_index(step: Path) -> None:
    os.truncate(step / "checkpoint", 100)


def empty_index(step: Path) -> None:
    os.truncate(step / "checkpoint", 0)


def without_chunk(step: Path) -> None:
    (step / CHUNK).unlink()


def cut_chunk(step: Path) -> None:
    os.truncate(step / CHUNK, 30)


def without_array(step: Path) -> None:
    shutil.rmtree((step / CHUNK).parent)


def cut_description(step: Path) -> None:
    os.truncate((step / CHUNK).with_name(".zarray"), 20)


UNFINISHED = [
    emptied,
    with_temporary_files_only,
    without_index,
    cut_index,
    empty_index,
    without_chunk,
    cut_chunk,
    without_array,
    cut_description,
]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("damage", UNFINISHED)
def test_the_newest_whole_step_is_read_and_a_note_names_the_skipped(
    damage: Callable[[Path], None], check: bool, run: Path
) -> None:
    damage(run / "checkpoint_2000")
    opened = open_dense(run, check=check)
    assert opened.path == run / "checkpoint_900"
    assert opened.read(EXPERTS).tobytes() == OLD[EXPERTS].tobytes()
    assert "checkpoint_900 is read, newer steps are skipped: checkpoint_2000: " in opened.notes[0]


@pytest.mark.parametrize("damage", UNFINISHED)
def test_an_unfinished_step_that_is_named_is_refused(damage: Callable[[Path], None], run: Path) -> None:
    damage(run / "checkpoint_2000")
    with pytest.raises(CheckpointError, match="checkpoint_2000") as caught:
        open_dense(run / "checkpoint_2000")
    assert caught.value.found is not None or caught.value.key is not None


def test_a_whole_newest_step_is_read_without_a_note(run: Path) -> None:
    assert holds(run, NEW)
    assert open_dense(run).notes == []


def test_of_steps_none_of_which_is_whole_every_fault_is_told(run: Path) -> None:
    without_index(run / "checkpoint_2000")
    without_chunk(run / "checkpoint_900")
    with pytest.raises(
        CheckpointError, match=r"no step is whole(.|\n)*checkpoint_2000: (.|\n)*checkpoint_900: "
    ):
        open_dense(run)
    unchecked = open_dense(run, check=False)
    assert [shard.name for shard in unchecked.shards() if shard.problem] == [CHUNK]
    assert "no step is whole" in unchecked.notes[0]


def test_a_step_that_may_not_be_read_is_not_skipped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be whole: going on with an older one would hide it."""
    read = Location.read

    def denied(location: Location, key: str) -> bytes | None:
        if location.name == "checkpoint_2000":
            raise Unreadable("cannot be read", path=f"{location.path}/{key}", found="PERMISSION_DENIED")
        return read(location, key)

    monkeypatch.setattr(Location, "read", denied)
    with pytest.raises(Unreadable, match="checkpoint_2000"):
        open_dense(run)


@pytest.mark.parametrize(
    "name", ["checkpoint_1e9", "checkpoint_9999.bak", "checkpoint_", "checkpoint_-3000", "checkpoint_٣٠٠٠٠"]
)
def test_a_directory_that_is_not_named_as_a_step_is_none(name: str, run: Path) -> None:
    (run / "checkpoint_2000").rename(run / name)
    assert holds(run, OLD)


@pytest.mark.parametrize("name", ["checkpoint_0010000", "step_3000", "3000", "checkpoint-3000", "ckpt_3000"])
def test_steps_are_compared_as_integers_whatever_their_prefix(name: str, run: Path) -> None:
    (run / "checkpoint_2000").rename(run / name)
    assert holds(run, NEW)


@pytest.mark.parametrize(
    "name", ["checkpoint_2000.tmp-1700000000", "2000.orbax-checkpoint-tmp-17", "2000.orbax-checkpoint-tmp"]
)
def test_a_step_that_is_being_written_is_passed_over_and_refused_by_name(name: str, run: Path) -> None:
    (run / "checkpoint_2000").rename(run / name)
    assert holds(run, OLD)
    for path in (run / name, run / name / "checkpoint"):
        with pytest.raises(CheckpointError, match="unfinished step"):
            open_dense(path)
    shutil.rmtree(run / "checkpoint_900")
    with pytest.raises(CheckpointError, match=r"no finished step(.|\n)*tmp"):
        open_dense(run)


def test_a_file_that_is_named_as_a_step_is_none(run: Path) -> None:
    (run / "checkpoint_3000").touch()
    assert holds(run, NEW)


ITEMS = ["state", "default", "params", "weird_item", "item.with.dots"]


def save_orbax(path: Path, parameters: Parameters, **options: bool) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, {"params": nested(parameters)})


@pytest.fixture(scope="module")
def orbax_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 900 and 2000 of Orbax's manager, as users of `args.StandardSave` have them."""
    path = tmp_path_factory.mktemp("orbax") / "run"
    with ocp.CheckpointManager(path) as manager:
        for step, parameters in ((900, OLD), (2000, NEW)):
            manager.save(step, args=ocp.args.StandardSave({"params": nested(parameters)}))
    return path


@pytest.fixture
def orbax_run(orbax_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(orbax_steps, tmp_path / "orbax"))


@pytest.mark.parametrize("item", ITEMS)
def test_an_item_of_any_name_is_found(item: str, orbax_run: Path) -> None:
    (orbax_run / "2000/default").rename(orbax_run / "2000" / item)
    for path in (
        orbax_run,
        orbax_run / "2000",
        orbax_run / "2000" / item,
        orbax_run / "2000" / item / "_METADATA",
    ):
        assert holds(path, NEW)
    assert holds(orbax_run / "2000/_CHECKPOINT_METADATA", NEW)


def test_the_item_that_holds_the_model_is_read_not_another(orbax_run: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(orbax_run / "2000/a_dataset", {"position": np.ones(3)})
    (orbax_run / "2000/default").rename(orbax_run / "2000/weights")
    assert holds(orbax_run, NEW)


def test_of_several_items_with_a_model_one_must_be_named(orbax_run: Path) -> None:
    step = orbax_run / "2000"
    shutil.copytree(step / "default", step / "ema")
    assert holds(step, NEW)  # "default" is Orbax's own name
    (step / "default").rename(step / "raw")
    with pytest.raises(
        CheckpointError, match=r"several items hold a model(.|\n)*ema, raw(.|\n)*name one of them"
    ):
        open_dense(step)
    assert holds(step / "raw", NEW)


def uncommitted(step: Path) -> None:
    (step / "_CHECKPOINT_METADATA").write_text('{"init_timestamp_nsecs": 17, "commit_timestamp_nsecs": null}')


def without_mark(step: Path) -> None:
    (step.parent / "900/commit_success.txt").touch()
    (step / "commit_success.txt").unlink(missing_ok=True)


def without_database(step: Path) -> None:
    shutil.rmtree(step / "default")


def cut_metadata(step: Path) -> None:
    os.truncate(step / "default/_METADATA", 40)


def without_data(step: Path) -> None:
    shutil.rmtree(step / "default/d")


def cut_database(step: Path) -> None:
    os.truncate(step / "default/manifest.ocdbt", 40)


@pytest.mark.parametrize(
    "damage", [uncommitted, without_mark, without_database, cut_metadata, without_data, cut_database]
)
def test_an_unfinished_step_of_orbax_is_skipped(damage: Callable[[Path], None], orbax_run: Path) -> None:
    damage(orbax_run / "2000")
    opened = open_dense(orbax_run)
    assert opened.read(EXPERTS).tobytes() == OLD[EXPERTS].tobytes()
    assert "2000: " in opened.notes[0]


def test_an_uncommitted_step_of_orbax_is_refused_by_name(orbax_run: Path) -> None:
    uncommitted(orbax_run / "2000")
    for path in (orbax_run / "2000", orbax_run / "2000/default"):
        with pytest.raises(CheckpointError, match=r"unfinished step(.|\n)*commit_timestamp_nsecs"):
            open_dense(path)


def test_a_database_that_is_not_merged_is_read_if_one_process_wrote_it(orbax_run: Path) -> None:
    item = orbax_run / "2000/default"
    (item / "manifest.ocdbt").unlink()
    shutil.rmtree(item / "d")
    opened = open_dense(orbax_run)
    for name, array in NEW.items():
        assert opened.read(name).tobytes() == array.tobytes()
    shutil.copytree(item / "ocdbt.process_0", item / "ocdbt.process_1")
    with pytest.raises(CheckpointError, match=r"not merged(.|\n)*ocdbt.process_1(.|\n)*merge"):
        open_dense(orbax_run / "2000")


def test_a_checkpoint_is_opened_by_a_file_within_its_directory(
    run: Path, orbax_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hugging_face = LAYOUTS["safetensors, shards"](tmp_path / "hf", TINY, NEW)
    shard = min(path.name for path in hugging_face.glob("model-*"))
    torch = LAYOUTS["torch"](tmp_path / "torch", TINY, NEW)
    within = {
        run / "checkpoint_2000": ("checkpoint",),
        orbax_run / "2000/default": ("_METADATA", "manifest.ocdbt"),
        orbax_run / "2000": ("_CHECKPOINT_METADATA",),
        hugging_face: ("model.safetensors.index.json", "config.json", shard),
        torch: ("pytorch_model.bin", "config.json"),
    }
    for directory, files in within.items():
        monkeypatch.chdir(directory)
        for file in files:
            for path in (
                file,
                f"./{file}",
                f"../{directory.name}/{file}",
                directory / file,
                (directory / file).as_uri(),
            ):
                assert holds(path, NEW), path
        for path in (".", "./", f"{directory}//", directory.as_uri() + "/"):
            assert holds(path, NEW), path
    monkeypatch.chdir(DATA / "upstream_ckpt_tiny_a")
    for file in ("noexp.pt", "sizes.pt", "exp00.pt", "config.json"):
        assert open_checkpoint(file).format == "upstream"


def test_links_to_directories_and_to_files_are_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "step").symlink_to(run / "checkpoint_2000")
    (tmp_path / "latest").symlink_to(run)
    assert holds(tmp_path / "step", NEW)
    assert holds(tmp_path / "latest", NEW)
    model = LAYOUTS["safetensors"](tmp_path / "snapshots/main", TINY, NEW)
    (tmp_path / "blobs").mkdir()
    for file in list(model.iterdir()):  # as huggingface_hub's cache lies
        shutil.move(file, tmp_path / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert holds(model, NEW)
    (tmp_path / "blobs/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors \(a link to nothing\)"):
        open_dense(model)


def test_a_file_that_is_named_is_read_and_not_a_preferred_one(run: Path, tmp_path: Path) -> None:
    both = LAYOUTS["torch"](tmp_path / "both", TINY, OLD)
    shutil.copy(LAYOUTS["safetensors"](tmp_path / "other", TINY, NEW) / "model.safetensors", both)
    assert holds(both, NEW)
    assert holds(both / "pytorch_model.bin", OLD)
    assert open_dense(both).notes == ["model.safetensors is read, not pytorch_model.bin beside it"]


def test_of_several_checkpoints_in_a_directory_the_others_are_told(run: Path, tmp_path: Path) -> None:
    both = LAYOUTS["safetensors"](tmp_path / "both", TINY, NEW)
    shutil.copytree(run / "checkpoint_900", both, dirs_exist_ok=True)
    shutil.copytree(run / "checkpoint_900", both / "checkpoint_900")
    opened = open_dense(both)
    assert opened.format == "huggingface"
    assert "name it: checkpoint, checkpoint_900" in opened.notes[0]
    for path in ("checkpoint", "checkpoint_900"):
        assert open_dense(both / path).format == "t5x"
        assert holds(both / path, OLD)


@pytest.mark.parametrize(
    ("name", "other", "remedy"),
    [
        ("model.safetensors", "Model.SafeTensors", "rename Model.SafeTensors to model.safetensors"),
        ("model.safetensors", "model.safetensors.incomplete", "complete model.safetensors.incomplete"),
        ("model.safetensors", "model.safetensors.part", "complete model.safetensors.part"),
    ],
)
def test_a_file_with_nearly_the_right_name_is_told(
    name: str, other: str, remedy: str, tmp_path: Path
) -> None:
    model = LAYOUTS["safetensors"](tmp_path / "model", TINY, NEW)
    (model / name).rename(model / other)
    with pytest.raises(CheckpointError) as caught:
        open_dense(model)
    assert caught.value.remedy == remedy


def test_a_shard_that_is_incomplete_or_not_listed_is_told(tmp_path: Path) -> None:
    model = LAYOUTS["safetensors, shards"](tmp_path / "model", TINY, NEW)
    shard = min(model.glob("model-*"))
    shutil.copy(shard, model / "model-00099-of-00099.safetensors")
    assert "not model-00099-of-00099.safetensors beside it" in open_dense(model).notes[0]
    shard.rename(model / f"{shard.name}.incomplete")
    with pytest.raises(CheckpointError, match=rf"no {shard.name}, but {shard.name}.incomplete"):
        open_dense(model)


def test_a_config_json_in_other_letters_is_told(tmp_path: Path) -> None:
    model = LAYOUTS["safetensors"](tmp_path / "model", TINY_TIED, random_parameters(TINY_TIED))
    (model / "config.json").rename(model / "Config.json")
    assert "no config.json (but Config.json)" in open_dense(model).notes[0]


def test_metadata_of_a_step_without_times_is_of_an_older_orbax(orbax_run: Path) -> None:
    metadata = orbax_run / "2000/_CHECKPOINT_METADATA"
    metadata.write_text(json.dumps({"item_handlers": {}}))
    assert holds(orbax_run, NEW)
