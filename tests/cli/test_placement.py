"""--experts and --expert-cache, and qmoe bench, which measures their cost."""

import pytest

import qmoe_jax as qj
from tests.helpers.cli_runs import answer, qmoe

TEXT = "bado ___ lita, <extra_id_3> mo."


def test_generated_text_does_not_depend_on_the_placement_of_experts(artifact):
    wanted = answer("generate", artifact, TEXT)
    found = qmoe("generate", artifact, TEXT, "--experts", "disk", "--expert-cache", "14KB", "--stats")
    assert found.stdout.splitlines() == [text["filled"] for text in wanted["texts"]]
    assert wanted["stats"]["experts"] is None
    assert "experts on disk: " in found.stderr
    assert "I/O wait" in found.stderr


def test_evaluate_runs_with_experts_on_the_host(artifact, texts):
    found = answer("evaluate", artifact, "--text", texts, "--samples", 8, "--experts", "host")
    assert found["experts"]["placement"] == "host"
    assert found["experts"]["lookups"] > 0


@pytest.mark.parametrize("experts", ["device", "host"])
def test_an_expert_cache_that_nothing_uses_is_refused(artifact, model, experts):
    options = "--expert-cache", "1GB"
    assert qmoe("generate", artifact, TEXT, "--experts", experts, *options).exit_code == 2
    result = qmoe("generate", model, TEXT, *options)
    assert result.exit_code == 1
    assert "is not compressed; its experts are not cached" in result.stderr
    with pytest.raises(ValueError, match="expert_cache: expected None unless experts are on disk"):
        qj.load_compressed(artifact, experts=experts, expert_cache=1 << 30)


def test_an_expert_cache_without_room_is_refused(artifact):
    result = qmoe("generate", artifact, TEXT, "--experts", "disk", "--expert-cache", "100")
    assert result.exit_code == 1
    assert "(one expert)" in result.stderr


@pytest.mark.parametrize("size", ["much", "2XB", "1.2.3GB", "9" * 400 + "GB"])
def test_a_cache_size_that_is_not_a_size_is_wrong_usage(artifact, size):
    result = qmoe("generate", artifact, TEXT, "--experts", "disk", "--expert-cache", size)
    assert result.exit_code == 2
    assert "2GB or 500MB" in result.stderr


def test_experts_of_a_dense_checkpoint_stay_on_the_device(model):
    result = qmoe("generate", model, TEXT, "--experts", "disk")
    assert result.exit_code == 1
    assert "compress it first" in result.stderr


def test_bench_reports_every_round(artifact):
    options = "--prompt", 8, "--new-tokens", 4, "--batch-size", 2, "--experts", "disk"
    found = answer("bench", artifact, *options)
    assert [(run["batch"], run["round"]) for run in found["runs"]] == [(2, 1), (2, 2)]
    first = found["runs"][0]
    assert first["reading"]["tokens"] == 16
    assert 0 < first["writing"]["tokens"] <= 8
    parts = first["reading"]["milliseconds_per_token"].values()
    assert sum(parts) == pytest.approx(1e3 * first["reading"]["seconds"] / 16)
    assert first["reading"]["experts"]["reads"] > 0


def test_bench_prints_a_table(model):
    shown = qmoe("bench", model, "--prompt", 8, "--new-tokens", 2, "--batch-size", 1, "--rounds", 1).stdout
    assert "tokens/s" in shown
    assert "experts on device" in shown
