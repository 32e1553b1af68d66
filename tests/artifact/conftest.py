"""Artifacts that several tests read; a test that changes one writes its own."""

import functools
import pathlib
import shutil
from collections.abc import Callable

import pytest

from qmoe_jax.artifact import Kind
from tests.helpers import artifact_samples as samples


@pytest.fixture(scope="session")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], pathlib.Path]:
    """An artifact of a kind, written once, not to be changed."""

    @functools.cache
    def write(kind: Kind) -> pathlib.Path:
        root = tmp_path_factory.mktemp("artifact") / "whole"
        samples.write_artifact(root, kind)
        return root

    return write


@pytest.fixture(scope="session")
def whole(artifact_of: Callable[[Kind], pathlib.Path]) -> pathlib.Path:
    """A ternary artifact, not to be changed."""
    return artifact_of(samples.KINDS["ternary"])


@pytest.fixture
def artifact(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it, to be changed."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))
