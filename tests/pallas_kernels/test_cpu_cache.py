"""Compiled kernels are kept where this user alone can write; a cache that fails costs no run."""

import os
import pickle
import tempfile
from pathlib import Path

import numba
import pytest

from pallas_kernels.cpu import cache


def add_one(number):
    return number + 1


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders of a user: for sources, NUMBA_CACHE_DIR, home and temporary files."""
    found = {name: tmp_path / name for name in ("source", "named", "home", "temporary")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(found["home"]))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(found["temporary"]))
    cache.folder_for.cache_clear()
    cache._warn.cache_clear()
    yield found
    cache.folder_for.cache_clear()
    cache._warn.cache_clear()


def refuse(place: Path) -> None:
    """Let nobody make a folder below `place`, not even root."""
    if place.is_dir():
        place.rename(place.with_name(place.name + ".away"))
    place.write_text("a file")


def chosen(places) -> Path:
    return Path(cache.folder_for(str(places["source"])))


def another_users(folder: Path, monkeypatch) -> None:
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


def test_beside_the_sources(places):
    assert chosen(places) == places["source"] / "__pycache__"


def test_in_the_folder_that_is_named(places, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(places["named"]))
    assert chosen(places).parent == places["named"]


def test_in_the_home_where_sources_cannot_be_written(places):
    refuse(places["source"] / "__pycache__")
    assert chosen(places).parent == places["home"] / ".cache" / "numba"


@pytest.mark.parametrize("home", ["/proc/nope", "", "relative"])
def test_in_a_private_folder_without_a_home(places, monkeypatch, home):
    refuse(places["source"] / "__pycache__")
    refuse(places["home"])
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    folder = chosen(places)
    assert folder.parent == places["temporary"] / f"pallas-kernels-{os.geteuid()}"
    assert folder.parent.stat().st_mode & 0o777 == 0o700


def test_nowhere_with_one_warning(places):
    refuse(places["source"] / "__pycache__")
    refuse(places["home"])
    refuse(places["temporary"])
    with pytest.warns(UserWarning, match="compiled anew by every process"):
        assert cache.folder_for(str(places["source"])) is None


def test_a_named_folder_that_cannot_be_used_is_told(places, monkeypatch):
    refuse(places["named"])
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(places["named"]))
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR cannot be used .*named"):
        assert chosen(places) == places["source"] / "__pycache__"


def test_a_folder_of_another_user_is_not_trusted(places, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(places["named"]))
    theirs = chosen(places)
    another_users(theirs, monkeypatch)
    monkeypatch.setattr(
        os,
        "stat",
        lambda path, *, real=os.stat: real(places["home"] if path == str(places["source"]) else path),
    )
    cache.folder_for.cache_clear()
    with pytest.warns(UserWarning, match="another user"):
        assert cache.folder_for(str(places["source"])) != str(theirs)


def test_a_folder_that_everyone_can_write_is_not_trusted(places):
    refuse(places["home"])
    (places["source"] / "__pycache__").mkdir()
    (places["source"] / "__pycache__").chmod(0o777)
    assert chosen(places).is_relative_to(places["temporary"])


def test_a_private_folder_that_is_a_link_is_not_trusted(places):
    refuse(places["source"] / "__pycache__")
    refuse(places["home"])
    (places["temporary"] / f"pallas-kernels-{os.geteuid()}").symlink_to(places["named"])
    with pytest.warns(UserWarning, match="this user's own"):
        assert cache.folder_for(str(places["source"])) is None


@pytest.fixture
def function(places, monkeypatch):
    """A function to compile, whose cache lies in the folder that is named."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(places["named"]))

    def make():
        dispatcher = numba.njit(add_one)
        cache.enable_cache(dispatcher)
        return dispatcher

    return make


def test_what_is_compiled_is_read_by_the_next_process(function):
    assert function()(1) == 2
    again = function()
    assert (again(1), sum(again.stats.cache_hits.values())) == (2, 1)


@pytest.mark.parametrize("damage", [b"", b"no pickle", pickle.dumps("0.0.0")[:4]])
def test_a_damaged_cache_is_replaced(function, places, damage):
    function()(1)
    (index,) = places["named"].rglob("*.nbi")
    index.write_bytes(damage)
    with pytest.warns(UserWarning, match="compiled anew"):
        assert function()(1) == 2
    again = function()
    assert (again(1), sum(again.stats.cache_hits.values())) == (2, 1)


def test_a_full_disk_costs_a_compilation(function, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.caching.IndexDataCacheFile, "_save_data", full)
    with pytest.warns(UserWarning, match="cannot be kept.*No space left"):
        assert function()(1) == 2
