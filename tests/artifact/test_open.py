"""Opening of any format by one function."""

import pathlib

import pytest

from qmoe_jax.artifact import ArtifactReader, is_artifact, open_checkpoint
from qmoe_jax.files.errors import CheckpointError

DATA = pathlib.Path(__file__).parent.parent / "golden"


def test_open_checkpoint_opens_an_artifact(whole: pathlib.Path) -> None:
    assert is_artifact(whole)
    assert isinstance(open_checkpoint(str(whole)), ArtifactReader)


@pytest.mark.parametrize(("path", "form"), [("t5x/switch_c_tiny_f32", "t5x"), ("hf_tiny_a", "huggingface")])
def test_open_checkpoint_opens_a_dense_checkpoint(path: str, form: str) -> None:
    assert not is_artifact(DATA / path)
    assert open_checkpoint(DATA / path).format == form


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(CheckpointError, match="no checkpoint of a known format") as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "notes.txt" in str(caught.value)


def test_a_shard_cut_short_is_found_on_opening(artifact: pathlib.Path) -> None:
    shard = next(iter(sorted(artifact.rglob("experts-*"))))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(artifact)
    assert isinstance(open_checkpoint(artifact, check=False), ArtifactReader)


def test_an_unfinished_artifact_is_refused(artifact: pathlib.Path) -> None:
    (artifact / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="unfinished"):
        open_checkpoint(artifact)
