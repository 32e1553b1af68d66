"""Levels and dense parameters that are not finite are refused in writing an artifact, found in reading."""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.artifact import ArtifactReader, dense, pack_matrix
from qmoe_jax.artifact.verify import verify
from qmoe_jax.files.errors import CheckpointError
from tests.helpers import artifact_samples as samples


@pytest.mark.parametrize("kind", ["ternary", "ternary, groups", "2 bits", "3 bits, groups"])
@pytest.mark.parametrize("value", [np.nan, 3.4e38])
def test_levels_that_are_not_finite_as_stored_are_not_packed(kind: str, value: float) -> None:
    rng, kind = np.random.default_rng(0), samples.KINDS[kind]
    digits, levels = (make(kind, (6, 20), rng) for make in (samples.random_digits, samples.random_levels))
    levels[4, 0, 0] = value
    with pytest.raises(ValueError, match="row 4: expected levels that are finite"):
        pack_matrix(kind, digits, levels, samples.CODEBOOKS)


@pytest.fixture
def not_finite(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Write an artifact with a NaN level in expert 3 and NaN in a norm, under right checksums."""
    whole, tree = samples.random_experts, samples.dense_tree()

    def experts(kind, stack, layer, start, stop):
        found = whole(kind, stack, layer, start, stop)
        if stack == "encoder" and start <= 3 < stop:
            matrix = found[3 - start]["wo"]
            levels = np.array(matrix.parts["levels"])
            levels[2, 1] = ml_dtypes.bfloat16(np.nan)
            damaged = dataclasses.replace(matrix, parts={**matrix.parts, "levels": levels})
            found[3 - start] = {**found[3 - start], "wo": damaged}
        return found

    tree["encoder"]["encoder_norm"]["scale"][1] = np.nan
    monkeypatch.setattr(samples, "random_experts", experts)
    monkeypatch.setattr(samples, "dense_tree", lambda: tree)
    with monkeypatch.context() as patch:
        patch.setattr(dense, "require_finite", lambda array, **_: array)
        samples.write_artifact(tmp_path / "out")
    return tmp_path / "out"


def test_verify_names_levels_and_parameters_that_are_not_finite(not_finite: pathlib.Path) -> None:
    parameter, expert = verify(not_finite).problems
    assert "encoder/encoder_norm/scale, element [1]" in parameter
    assert "expert 3, wo" in expert
    assert "row 2" in expert


def test_reading_a_level_that_is_not_finite_names_the_expert(not_finite: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="expert 3, wo") as raised:
        ArtifactReader.open(not_finite).read("encoder/layers_1/mlp/expert/wo/kernel")
    assert "encoder.layers_01" in raised.value.path
