"""The folder in which numba keeps compiled kernels: the first that this user can write and may trust.

The folders, in order: NUMBA_CACHE_DIR where it is set, `__pycache__` beside the source, the user's cache
folder (XDG_CACHE_HOME or ~/.cache), and a folder of mode 0700 in the system's temporary folder. Without any
of them, and where the cache cannot be read or written, every process compiles anew.

numba's cache is a pickle, which runs code when it is read. A folder is trusted only where nobody but this
user, root or the owner of the source can write.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import numba
from numba.core import caching


def enable_cache(dispatcher: Any) -> None:
    """Have a function that numba compiles keep its code on disk, where there is a folder for it."""
    source = os.path.dirname(os.path.abspath(dispatcher.py_func.__code__.co_filename))
    if folder_for(source) is not None:
        dispatcher._cache = _Cache(dispatcher.py_func)  # as numba's own `enable_caching` does


@functools.cache
def folder_for(source: str) -> str | None:
    """Return the cache folder of the modules in the folder `source`; None, with a warning, without any."""
    refused = {}
    for name, folder in _candidates(source):
        try:
            _prepare(folder, os.stat(source).st_uid)
        except OSError as error:
            refused[name] = f"{folder}: {error.strerror or error}"
            continue
        if "NUMBA_CACHE_DIR" in refused:
            _warn(f"NUMBA_CACHE_DIR cannot be used ({refused['NUMBA_CACHE_DIR']}): {name} is used instead")
        return folder
    _warn(
        "kernels are compiled anew by every process (seconds each), for no folder can cache them: "
        f"{'; '.join(refused.values())}. Set NUMBA_CACHE_DIR to a folder that this user alone can write"
    )
    return None


def _candidates(source: str) -> Iterator[tuple[str, str]]:
    """Yield the folders to try, by name; modules of one name in other folders have other folders."""
    leaf = f"{os.path.basename(source)}_{hashlib.sha1(os.fsencode(source)).hexdigest()}"
    if named := str(vars(numba.config).get("CACHE_DIR") or ""):
        yield "NUMBA_CACHE_DIR", os.path.join(os.path.abspath(named), leaf)
    yield "the folder of the sources", os.path.join(source, "__pycache__")
    # Without a home `~` stays as it is: that would be a folder of this name below the current one.
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(user):
        yield "the user's cache folder", os.path.join(user, "numba", leaf)
    with contextlib.suppress(OSError):  # no temporary folder can be written
        private = os.path.join(tempfile.gettempdir(), f"pallas-kernels-{os.geteuid()}")
        yield "the folder for temporary files", os.path.join(private, leaf)


def _prepare(folder: str, source_owner: int) -> None:
    """Make a folder if it is missing, and see that it can be trusted and written.

    Raises:
        OSError: it cannot.
    """
    parent, me = os.path.dirname(folder), os.geteuid()
    if parent == os.path.join(tempfile.gettempdir(), f"pallas-kernels-{me}"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(parent, 0o700)
        found = os.lstat(parent)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != me or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(errno.EPERM, "is not this user's own", parent)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o755)
    found = os.stat(folder)
    if found.st_uid not in (me, 0, source_owner):
        raise PermissionError(errno.EPERM, f"belongs to another user ({found.st_uid})", folder)
    if found.st_mode & stat.S_IWOTH:
        raise PermissionError(errno.EPERM, "can be written by every user", folder)
    tempfile.TemporaryFile(dir=folder).close()


class _Locator(caching.UserProvidedCacheLocator):
    """The place of a function's files, for numba."""

    def __init__(self, function: Any, file: str) -> None:
        self._py_file, self._lineno = file, function.__code__.co_firstlineno
        folder = folder_for(os.path.dirname(os.path.abspath(file)))
        assert folder is not None  # else there is no cache
        self._cache_path = folder

    @classmethod
    def from_function(cls, function: Any, file: str) -> _Locator:
        return cls(function, file)


class _Implementation(caching.CompileResultCacheImpl):
    _locator_classes: list[Any] = [_Locator]  # noqa: RUF012


class _Cache(caching.FunctionCache):
    """numba's cache, except that a full disk or a damaged file costs a compilation, not the run."""

    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the code of a signature; None where there is none that can be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # a damaged pickle may raise anything
            _warn(f"{self.cache_path}: a cached kernel cannot be read, and is compiled anew: {error!r}")
            with contextlib.suppress(OSError):
                self.flush()  # else the same index would fail again when the new code is saved
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code of a signature."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(
                f"{self.cache_path}: a kernel cannot be kept, so the next process compiles it: {error!r}. "
                "Free some space there, or set NUMBA_CACHE_DIR to another folder"
            )
            self.disable()


@functools.cache
def _warn(text: str) -> None:
    """Warn once per process."""
    warnings.warn(text, stacklevel=3)
