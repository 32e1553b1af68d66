"""Plans: figures that are known of c-2048, and refusals that say what to change."""

import dataclasses
import json

import pytest

import qmoe_jax as qj
from qmoe_jax.compression.planning.costs import ExpertStorage
from qmoe_jax.compression.planning.plan import planned_passes
from qmoe_jax.compression.planning.rates import H100
from qmoe_jax.compression.planning.resources import Limits, Resources, bits_per_weight

MODEL = qj.PRESETS["switch-c-2048"]
TOKENS = qj.TokenCounts(160_000, 82_000_000, 20_000_000)
T5X = ExpertStorage(4, 256, True, 0.92, 208)
GB = 10**9


def resources(**options) -> Resources:
    return Resources(MODEL, qj.CompressionConfig(**options), TOKENS, T5X, on_host=False)


def minutes(op: str) -> float:
    """The time of one kind of arithmetic for all of c-2048 on one H100, as findings/scale.md has it."""
    passes = planned_passes(MODEL, qj.CompressionConfig(), TOKENS, H100, storage=T5X)
    return sum(each.flops.get(op, 0.0) for each in passes) / 60


def test_flops_of_c_2048_are_those_computed_by_hand():
    tokens, width, hidden = 102e6, 2080, 6144
    flops = {kind: 60 * minutes(kind) for kind in ("calibrate", "quantize", "forward")}
    squares = 2 * (width**2 + hidden**2) + 2 * width * hidden
    assert flops["calibrate"] == pytest.approx(15 * tokens * squares)
    experts = 30 * 2048
    cubes = (width**3 + hidden**3) / 3 + width * hidden * (width + hidden)
    assert flops["quantize"] == pytest.approx(experts * cubes)
    last = 20e6  # nothing comes behind the last layer
    assert flops["forward"] == pytest.approx((15 * tokens - last) * 4 * width * hidden)


def test_many_hosts_and_devices_take_their_share_of_the_time():
    passes = lambda **more: planned_passes(MODEL, qj.CompressionConfig(), TOKENS, H100, storage=T5X, **more)
    total = lambda planned: sum(each.seconds for each in planned)
    assert total(passes(hosts=4)) == pytest.approx(total(passes()) / 4)
    compute = lambda planned: sum(each.stages["compute"] for each in planned)
    assert compute(passes(devices=8)) == pytest.approx(compute(passes()) / 8)


def test_disk_of_c_2048():
    assert resources().scratch["hidden states"] == 2 * 82_000_000 * 2080 * 4
    assert resources().scratch["staged experts"] == pytest.approx(54 * GB, rel=0.05)
    assert sum(resources().artifact.values()) == pytest.approx(148 * GB, rel=0.05)


def test_memory_grows_with_tokens_by_a_few_bytes_only():
    longer = dataclasses.replace(resources(), tokens=TOKENS.scaled(10))
    grown = sum(longer.memory.values()) - sum(resources().memory.values())
    assert grown == 9 * 35 * 102_000_000


def test_a_slice_needs_less_of_everything():
    whole, part = resources(), resources(layers="0", experts="0-15")
    assert sum(part.artifact.values()) < 0.05 * sum(whole.artifact.values())
    assert part.scratch["staged experts"] == whole.scratch["staged experts"] // 16
    assert part.memory["staging"] < whole.memory["staging"]


def test_uniform_grids_take_their_bits():
    assert bits_per_weight(qj.CompressionConfig(bits=3)) == 3
    assert 0.6 < bits_per_weight(qj.CompressionConfig()) < 0.8


def problem(limits: Limits, **options) -> qj.CheckpointError:
    found = list(resources(**options).problems(limits, output="out", scratch="fast"))
    assert len(found) == 1
    return found[0]


def test_too_little_memory_is_refused_with_a_group_size_that_fits():
    limits = Limits(memory=12 * GB)
    error = problem(limits)
    assert error.remedy == ("quantize fewer experts together (--experts-per-group 8, experts_per_group=8)")
    assert error.path == "out" and "expert groups ahead 4.9 GB" in error.expected
    assert not list(resources(experts_per_group=8).problems(limits, output="out", scratch="fast"))


def test_too_small_a_device_is_refused_with_a_group_size_that_fits():
    assert "--experts-per-group 2," in problem(Limits(device=4 * GB)).remedy
    assert problem(Limits(device=GB // 2)).remedy == "use a machine with more memory"


def test_too_small_a_disk_is_refused_with_a_number_of_samples_that_fits():
    limits = Limits(scratch=1000 * GB)
    error = problem(limits)
    assert (error.path, error.found) == ("fast", "1,000.0 GB")
    samples = int(error.remedy.split("at most ")[1].split(" ")[0].replace(",", ""))
    fewer = dataclasses.replace(resources(), tokens=TOKENS.scaled(samples / TOKENS.samples))
    assert not list(fewer.problems(limits, output="out", scratch="fast"))


def test_an_artifact_that_does_not_fit_is_refused():
    assert problem(Limits(artifact=100 * GB)).problem == "the artifact does not fit on the disk"


def test_a_disk_for_both_must_hold_both():
    both = Limits(scratch=1500 * GB, artifact=1500 * GB, one_disk=True)
    assert "artifact 148.5 GB" in problem(both).expected


def test_a_plan_of_a_checkpoint_is_json_and_touches_nothing(data, tmp_path):
    found = qj.plan(
        data / "hf_tiny_a", qj.TokenCounts(10, 1000, 200), output=tmp_path / "out", rates=H100, devices=2
    )
    fields = json.loads(json.dumps(found.to_json()))
    assert fields["seconds"] == pytest.approx(sum(each["seconds"] for each in fields["passes"]))
    assert (fields["devices"], fields["problems"]) == (2, [])
    assert list(tmp_path.iterdir()) == []
    found.require_fit()


def test_a_plan_that_does_not_fit_raises(data, tmp_path):
    tokens = qj.TokenCounts(10**6, 10**15, 10)
    found = dataclasses.replace(
        qj.plan(data / "hf_tiny_a", tokens, rates=H100),
        problems=tuple(resources().problems(Limits(memory=GB), output="out", scratch=None)),
    )
    with pytest.raises(qj.CheckpointError, match="more memory than there is"):
        found.require_fit()


def test_a_compression_that_does_not_fit_is_refused_before_its_first_group(
    data, samples, tmp_path, monkeypatch
):
    monkeypatch.setattr(Limits, "here", classmethod(lambda cls, output, scratch: Limits(memory=GB // 10)))
    config = qj.CompressionConfig(sentinel_start=480)
    with pytest.raises(qj.CheckpointError, match="use a machine with more memory"):
        qj.compress(data / "hf_tiny_a", tmp_path / "model", samples[:2], config)
    assert not list(tmp_path.glob("model/experts/*"))
