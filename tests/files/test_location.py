"""Paths and file URLs: which of them mean the same local directory, and which are refused."""

from pathlib import Path

import pytest

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.location import Location, local_path


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a/b", "/a/b"),
        ("FILE:///a/b", "/a/b"),
        ("file://localhost/a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("file:///a%20b/", "/a b"),
        ("file:///a b", "/a b"),
        ("file:///a+b", "/a+b"),
        ("file:///100%25", "/100%"),
        ("file:///a%2Fb", "/a/b"),
        ("file:///a%3Fb%23c", "/a?b#c"),
        ("file:///%C3%A9", "/é"),
        ("file:///mod%E9le", b"/mod\xe9le".decode(errors="surrogateescape")),
        ("file:///~/a", "/~/a"),
    ],
)
def test_a_file_url_means_the_path_that_it_encodes(url: str, path: str) -> None:
    assert local_path(url) == Path(path)
    assert local_path(Path(url)) == Path(path) or "localhost" in url


@pytest.mark.parametrize(
    "url",
    ["file:///a?b=1", "file:///a#b", "file://host/a", "file:a/b", "file://", "file://~/a", "file:///a%00b"],
)
def test_a_file_url_that_means_no_local_path_is_refused(url: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"file URL(.|\n)*percent-encoded(.|\n)*pass the path itself"
    ) as caught:
        Location.of(url)
    assert caught.value.path == url


def test_a_path_that_looks_like_a_file_url_is_a_path_where_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file:a").mkdir()
    assert local_path("file:a") == Path("file:a")


def test_percent_signs_and_pluses_of_a_path_are_its_own() -> None:
    assert local_path("/a%20b+c") == Path("/a%20b+c")
    assert local_path("~/a") == Path.home() / "a"
    assert local_path("gs://bucket/a") is None


@pytest.mark.parametrize(
    ("path", "parent"),
    [("checkpoint", "."), ("./checkpoint", "."), ("a/b", "a"), ("/a", "/"), ("../a", "..")],
)
def test_the_parent_of_a_relative_path_is_its_directory(path: str, parent: str) -> None:
    assert Location.of(path).parent.path == Path(parent)


def test_the_scheme_of_a_url_may_be_in_capitals() -> None:
    assert Location.of("GS://bucket/Run/").path == "gs://bucket/Run"
    assert Location.of("gs://bucket/Run").parent.path == "gs://bucket"


def test_a_path_that_is_not_utf8_is_opened_by_tensorstore(tmp_path: Path) -> None:
    folder = tmp_path / "mod\udce9le"
    folder.mkdir()
    (folder / "file").write_bytes(b"bytes")
    assert Location.of(folder).read("file") == b"bytes"
    assert (Location.of(tmp_path) / folder.name).read("file") == b"bytes"
    assert Location.of(folder / "mod\udce9le").read("file") is None


def test_a_directory_that_has_been_replaced_is_opened_anew(tmp_path: Path) -> None:
    folder = tmp_path / "mod\udce9le"
    folder.mkdir()
    assert Location.of(folder).read("file") is None
    folder.rename(tmp_path / "away")
    folder.mkdir()
    (folder / "file").write_bytes(b"bytes")
    assert Location.of(folder).read("file") == b"bytes"
