"""Launch configurations: explicit, then tuned, then heuristic; the tuner with a clock of its own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.matmul.pallas import gather, separate, tensor_core
from pallas_kernels.matmul.routes import RouteConfig
from pallas_kernels.tuning import Problem
from pallas_kernels.unpack import pallas as unpack
from tests.helpers import packed_samples as samples

PROBLEM = Problem("separate", 2080, 6144, "256x1x2", "bfloat16")
CONFIGS = {
    config.kind: config
    for config in (separate.Config, gather.Config, tensor_core.Config, unpack.Config, RouteConfig)
}
CANDIDATES = [separate.Config(rows, 32, 4) for rows in (1, 2, 4, 8)]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Stores choices as this device's table."""
    monkeypatch.setattr(tuning, "DATA", tmp_path)

    def store(*choices):
        path = tuning.table_path(jax.devices()[0].device_kind)
        path.write_text(json.dumps(tuning.tuned_table("a device", list(choices))))
        return path

    return store


def fake_clock(config):
    """Two rows are fastest, eight do not fit."""
    if config.rows == 8:
        raise NotImplementedError("shared memory")
    return 1e-6 * (5 + abs(config.rows - 2))


def test_the_fastest_candidate_wins_and_all_are_kept():
    entry = tuning.autotune(PROBLEM, CANDIDATES, fake_clock)
    assert entry["config"] == {"rows": 2, "tile": 32, "warps": 4}
    assert entry["microseconds"] == 5
    assert [trial.get("microseconds") for trial in entry["trials"]] == [6, 5, 7, None]
    assert entry["trials"][3]["failure"] == "NotImplementedError: shared memory"


def test_no_candidate_that_runs_is_an_error():
    with pytest.raises(RuntimeError, match=r"no candidate ran: .*shared memory"):
        tuning.autotune(PROBLEM, CANDIDATES[3:], fake_clock)


def test_a_stored_choice_is_taken(stored):
    stored(tuning.autotune(PROBLEM, CANDIDATES, fake_clock))
    assert tuning.choose(separate.Config, PROBLEM, strict=True) == separate.Config(2, 32, 4)
    other = dataclasses.replace(PROBLEM, width=64)
    assert tuning.choose(separate.Config, other) == separate.Config.heuristic(other)


def test_an_explicit_choice_goes_before_a_stored_one(stored):
    stored(tuning.autotune(PROBLEM, CANDIDATES, fake_clock))
    assert tuning.choose(separate.Config, PROBLEM, CANDIDATES[0]) == CANDIDATES[0]


def test_an_explicit_choice_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"separate: expected a Config, found Config\(tile=128, warps=1\)"):
        tuning.choose(separate.Config, PROBLEM, unpack.Config(128, 1))


def test_strict_refuses_the_heuristic(stored):
    with pytest.raises(LookupError, match=r"nothing tuned for Problem\(kind='separate'.*benchmarks.kernels"):
        tuning.choose(separate.Config, PROBLEM, strict=True)


def test_a_table_of_another_shape_is_refused(stored):
    entry = tuning.autotune(PROBLEM, CANDIDATES, fake_clock)
    entry["config"] = {"block": 3}
    stored(entry)
    with pytest.raises(ValueError, match="not a configuration of this version"):
        tuning.choose(separate.Config, PROBLEM)


def test_a_table_with_another_key_is_refused(stored):
    entry = tuning.autotune(PROBLEM, CANDIDATES, fake_clock)
    entry["problem"]["load"] = 3
    with pytest.raises(ValueError, match="not a choice of this version"):
        tuning.load_table(stored(entry))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tokens_per_expert", [1, 16, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heuristics_are_launches_that_triton_takes(kind, tokens_per_expert, dtype):
    config = CONFIGS[kind].heuristic(Problem(kind, 2080, 6144, "256x1x2", dtype, tokens_per_expert))
    assert type(config) is CONFIGS[kind]
    sizes = dataclasses.asdict(config)
    powers = [sizes[name] for name in ("rows", "tile", "lanes", "columns", "warps") if name in sizes]
    assert all(size & (size - 1) == 0 for size in powers)


def test_a_problem_names_shape_codebook_and_load():
    packed = samples.sample(samples.CODEBOOKS["tunstall-8"](), (4, 7, 40)).packed
    problem = Problem.of("gather", packed, jnp.bfloat16, tokens=21)
    assert problem == Problem("gather", 7, 40, "255x1x2", "bfloat16", tokens_per_expert=8)


def test_committed_tables_can_be_read():
    for path in tuning.DATA.glob("*.json"):
        table = tuning.load_table(path)
        assert table
        for problem, config in table.items():
            CONFIGS[problem.kind](**config)
