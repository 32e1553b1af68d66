"""Places that cannot be written, or hold what must not be overwritten, are refused before any work."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.names import is_stray
from qmoe_jax.files.output import new_output_directory, output_directory, output_file


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory; nothing may be left in it by a check that refuses."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket/out", "s3://bucket/out", "GS://bucket", "http://host/out", "hf://user/model",
        "az://x/y", "file://host/out", "server:/data/out", Path("gs://bucket/out"), Path("file://host/out"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("check", [output_directory, new_output_directory, output_file])
def test_a_url_is_refused_and_nothing_is_made(here: Path, check, url) -> None:
    with pytest.raises(CheckpointError, match="URL") as caught:
        check(url)
    assert caught.value.path == str(url)
    assert caught.value.remedy
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["out", "a/b/c", "./out", "with space", "a#b?c%20d", "a:b", "new\nline", "mod\udce9le"]
)
def test_a_path_may_have_any_name_and_missing_parents(here: Path, name: str) -> None:
    assert output_directory(name) == Path(name)
    assert list(here.iterdir()) == []


def test_a_file_url_is_the_path_that_it_means(here: Path) -> None:
    assert output_directory(f"file://{here}/a%20b") == here / "a b"


def test_a_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert output_directory("~/out") == here / "out"


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_not_a_path(path: str) -> None:
    with pytest.raises(CheckpointError, match="is not a path"):
        output_directory(path)


@pytest.mark.parametrize("path", ["file", "file/in/it"])
def test_a_file_and_a_path_in_it(here: Path, path: str) -> None:
    (here / "file").touch()
    with pytest.raises(CheckpointError, match="file: is a file"):
        output_directory(path)


@pytest.mark.parametrize("path", ["link", "link/in/it"])
def test_a_link_to_nothing(here: Path, path: str) -> None:
    (here / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"link: is a symbolic link to nothing(.|\n)*nowhere"):
        output_directory(path)


def test_a_link_to_a_directory_will_do(here: Path) -> None:
    (here / "there").mkdir()
    (here / "link").symlink_to("there")
    assert output_directory("link/out") == Path("link/out")


def test_links_in_a_circle(here: Path) -> None:
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")
    with pytest.raises(CheckpointError, match=r"a: cannot be written(.|\n)*symbolic links"):
        output_directory("a")


@pytest.mark.parametrize("path", ["x" * 300, "/".join(["x" * 200] * 30)])
def test_a_name_that_is_too_long(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be written(.|\n)*shorter"):
        output_directory(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_where_the_system_does_not_let_us_write(monkeypatch, number: int) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(CheckpointError, match=r"a/out: cannot be written(.|\n)*remedy: ") as caught:
        output_directory("a/out")
    assert caught.value.found == os.strerror(number)


@pytest.mark.parametrize("output", ["model", "model/out", "link", "model/../model/a/b"])
def test_the_input_and_what_lies_within_it(here: Path, output: str) -> None:
    (here / "model").mkdir()
    (here / "link").symlink_to("model")
    with pytest.raises(CheckpointError, match=r"input(.|\n)*remedy: choose another directory"):
        output_directory(output, inputs=("gs://other/model", str(here / "model")))


def test_beside_an_input_and_around_it(here: Path) -> None:
    (here / "runs" / "model").mkdir(parents=True)
    for output in ("runs", "runs/model-2"):
        assert output_directory(output, inputs=(here / "runs" / "model",)) == Path(output)


def test_a_directory_with_something_in_it_is_not_new(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / ".DS_Store").touch()
    (here / "out" / "lost+found").mkdir()
    assert new_output_directory("out") == Path("out")
    (here / "out" / "thesis.doc").touch()
    with pytest.raises(CheckpointError, match=r"out: is not empty(.|\n)*thesis\.doc"):
        new_output_directory("out")


def test_a_file_may_be_replaced_but_not_a_directory(here: Path) -> None:
    (here / "file").touch()
    assert output_file("file") == Path("file")
    with pytest.raises(CheckpointError, match="is a directory"):
        output_file(here)


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "._x", ".nfs01", "Thumbs.db", ".ipynb_checkpoints", "lost+found", "a.swp", "a~", "#a#"],
)
def test_strays(name: str) -> None:
    assert is_stray(name)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "d", "a.b", "#1"])
def test_other_names(name: str) -> None:
    assert not is_stray(name)
