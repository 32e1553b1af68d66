"""The contract of every expert placement: the same model, wherever its experts live."""

import gc
import shutil
import threading
import weakref

import jax
import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.inference.placement import DiskExperts, choose, stores_of
from tests.helpers.choices import assert_same_generation

EXPERT = 4_500
"""More bytes than one expert of the test model takes, less than two."""

PLACEMENTS = {
    "host": {"experts": "host"},
    "disk": {"experts": "disk"},
    "disk, a cache of one expert": {"experts": "disk", "expert_cache": EXPERT},
}
every_placement = pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)


@pytest.fixture(scope="module")
def expected(artifact):
    path, examples = artifact
    model, params = qj.load_compressed(path, experts="device")
    encoder, decoder = batch_of(examples)
    logits = [np.asarray(apply({"params": params}, encoder, decoder)) for apply in ways_to_apply(model)]
    tokens = np.asarray(qj.generate(model, params, encoder, max_new_tokens=8))
    return logits, tokens, qj.evaluate(model, params, examples).loss


def ways_to_apply(model):
    """As it is, and under jit, which rounds otherwise."""
    return model.apply, jax.jit(model.apply)


def batch_of(examples):
    encoder, decoder = zip(*examples, strict=True)
    return np.stack(encoder), np.stack(decoder)


@every_placement
def test_logits_are_the_same_in_every_placement(artifact, expected, options, relative):
    path, examples = artifact
    model, params = qj.load_compressed(path, **options)
    for apply, logits in zip(ways_to_apply(model), expected[0], strict=True):
        assert relative(apply({"params": params}, *batch_of(examples)), logits) <= 1e-5


@every_placement
def test_generated_tokens_are_the_same_in_every_placement(artifact, expected, options):
    path, examples = artifact
    model, params = qj.load_compressed(path, **options)
    found = qj.generate(model, params, batch_of(examples)[0], max_new_tokens=8)
    assert_same_generation(model, params, batch_of(examples)[0], found, expected[1])


def test_the_loss_is_the_same_while_experts_are_evicted(artifact, expected):
    path, examples = artifact
    model, params = qj.load_compressed(path, experts="disk", expert_cache=3 * EXPERT)
    assert qj.evaluate(model, params, examples).loss == pytest.approx(expected[2], rel=1e-6)


def test_placed_experts_compute_in_float32_for_a_bfloat16_model(artifact, relative):
    path, examples = artifact
    encoder, decoder = batch_of(examples)
    found, wanted = (
        jax.jit(model.apply)({"params": params}, encoder, decoder)
        for model, params in (
            qj.load_compressed(path, "bfloat16", experts="disk"),
            qj.load_compressed(path, "bfloat16", experts="device"),
        )
    )
    assert relative(found, wanted) <= 1e-5


@pytest.mark.parametrize("options", [{"experts": "host"}, {"experts": "disk", "expert_cache": 3 * EXPERT}])
def test_an_accelerator_gets_the_routed_experts_packed(artifact, expected, monkeypatch, relative, options):
    path, examples = artifact
    model, params = qj.load_compressed(path, **options)
    monkeypatch.setattr("qmoe_jax.inference.placement.layer.platform", lambda: "gpu")
    logits = ways_to_apply(model)[1]({"params": params}, *batch_of(examples))
    assert relative(logits, expected[0][1]) <= 1e-5
    assert qj.expert_statistics(params).calls == 4
    assert qj.expert_statistics(params).compute_seconds == 0


def test_a_directory_of_upstream_runs_from_host_memory(data, relative):
    path = data / "upstream_ckpt_tiny_a"
    (model, params), (_, placed) = qj.load_compressed(path), qj.load_compressed(path, experts="host")
    tokens = np.arange(2, 22)[None], np.arange(0, 6)[None]
    run = jax.jit(model.apply)
    assert relative(run({"params": placed}, *tokens), run({"params": params}, *tokens)) <= 1e-5
    with pytest.raises(qj.CheckpointError, match="cannot be kept on disk"):
        qj.load_compressed(path, experts="disk")


def test_kinds_that_do_not_run_packed_are_refused_by_name(data, artifact, tmp_path):
    config = qj.CompressionConfig(bits=2, method="nearest", sentinel_start=480)
    qj.compress(data / "hf_tiny_a", tmp_path / "two-bit", artifact[1], config)
    with pytest.raises(qj.CheckpointError, match=r"(?s)layers_1/mlp/expert/w[io]/kernel.*experts='device'"):
        qj.load_compressed(tmp_path / "two-bit", experts="disk")
    _, params = qj.load_compressed(tmp_path / "two-bit", experts=None)
    assert not stores_of(params)


def test_statistics_count_every_lookup(artifact):
    path, examples = artifact
    model, params = qj.load_compressed(path, experts="disk")
    tokens, run = batch_of(examples), jax.jit(model.apply)
    jax.block_until_ready(run({"params": params}, *tokens))
    first = qj.expert_statistics(params).to_json()
    assert first["calls"] == 4
    assert 4 <= first["reads"] == first["lookups"] <= 32
    assert first["evictions"] == first["hits"] == 0
    jax.block_until_ready(run({"params": params}, *tokens))
    again = qj.expert_statistics(params)
    assert (again.reads, again.hits, again.lookups) == (
        first["reads"],
        first["lookups"],
        2 * first["lookups"],
    )
    assert again.hit_rate == 0.5
    assert "lookups hit memory (50.0%)" in str(again)
    again.reset()
    assert (again.lookups, again.placement) == (0, "disk")


def test_the_cache_stays_within_its_budget_and_evicts_the_oldest(artifact):
    path, examples = artifact
    model, params = qj.load_compressed(path, experts="disk", expert_cache=3 * EXPERT)
    statistics = qj.expert_statistics(params)
    assert statistics.resident_bytes <= 3 * EXPERT
    jax.block_until_ready(jax.jit(model.apply)({"params": params}, *batch_of(examples)))
    assert statistics.evictions == statistics.reads - 3


def test_the_least_recently_used_expert_is_evicted(artifact):
    path, _ = artifact
    store = stores_of(qj.load_compressed(path, experts="disk", expert_cache=2 * EXPERT)[1])[0]
    use = lambda expert: run_one(store, expert)
    for expert in (0, 1, 0, 2):
        use(expert)
    reads = store.statistics.reads
    use(0)
    assert store.statistics.reads == reads
    use(1)
    assert store.statistics.reads == reads + 1


def run_one(store, expert):
    x = np.ones((1, 64), np.float32)
    y = np.empty_like(x)
    store.run(("encoder", 1), x, np.array([expert], np.int32), np.ones(1, np.float32), y)
    return y


def test_a_cache_below_one_expert_is_refused_with_the_size_of_one(artifact):
    with pytest.raises(ValueError, match=r"at least [\d,]+ bytes \(one expert\), found 10"):
        qj.load_compressed(artifact[0], experts="disk", expert_cache=10)


def test_an_unknown_placement_is_refused(artifact):
    with pytest.raises(ValueError, match="'device', 'host', 'disk'"):
        qj.load_compressed(artifact[0], experts="tape")


def test_compiled_programs_do_not_keep_experts_in_memory(artifact):
    path, examples = artifact
    model, params = qj.load_compressed(path, experts="disk")
    qj.generate(model, params, batch_of(examples)[0], max_new_tokens=2)
    store = weakref.ref(stores_of(params)[0])
    del params
    gc.collect()
    assert store() is None


def test_two_generations_share_a_store_at_once(artifact, expected):
    path, examples = artifact
    model, params = qj.load_compressed(path, experts="disk", expert_cache=2 * EXPERT)
    found = {}
    write = lambda i: found.update(
        {i: np.asarray(qj.generate(model, params, batch_of(examples)[0], max_new_tokens=8))}
    )
    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tokens in found.values():
        assert_same_generation(model, params, batch_of(examples)[0], tokens, expected[1])
    assert len(found) == 2


@pytest.mark.parametrize(
    ("memory", "placement"), [(1 << 30, "device"), (100_000, "disk")], ids=["much memory", "little memory"]
)
def test_the_default_placement_is_the_first_that_fits(artifact, monkeypatch, memory, placement):
    monkeypatch.setattr(choose, "available_memory", lambda: memory)
    plan = choose.plan_placement(qj.open_checkpoint(artifact[0]), "float32")
    assert plan.placement == placement


def test_without_memory_the_cache_still_holds_an_expert(artifact, monkeypatch):
    monkeypatch.setattr(choose, "available_memory", lambda: 0)
    plan = choose.plan_placement(qj.open_checkpoint(artifact[0]), "float32")
    assert (plan.placement, plan.expert_cache > 0) == ("disk", True)
    qj.load_compressed(artifact[0])


@pytest.mark.parametrize(("placement", "cache"), [("device", None), ("host", None), ("disk", 1 << 20)])
def test_memory_is_not_measured_where_no_option_depends_on_it(artifact, monkeypatch, placement, cache):
    """So explicit options also work where the system has no /proc."""
    monkeypatch.setattr(choose, "available_memory", None)
    plan = choose.plan_placement(qj.open_checkpoint(artifact[0]), "float32", placement, cache)
    assert (plan.placement, plan.expert_cache) == (placement, cache)


def test_experts_that_exceed_one_device_fit_over_two(artifact, monkeypatch):
    reader = qj.open_checkpoint(artifact[0])
    experts = sum(group.record.bytes for group in reader.manifest.groups)
    monkeypatch.setattr(choose, "device_memory", lambda: experts)
    monkeypatch.setattr(choose, "dense_bytes", lambda reader, dtype: 0)
    found = [choose.plan_placement(reader, "float32", devices=devices).placement for devices in (1, 2)]
    assert found == ["host", "device"]


def test_experts_that_exceed_device_memory_stay_in_host_memory(artifact, monkeypatch):
    monkeypatch.setattr(choose, "device_memory", lambda: 4 << 20)
    monkeypatch.setattr(choose, "dense_bytes", lambda reader, dtype: 3 << 20)
    monkeypatch.setattr(choose, "available_memory", lambda: 1 << 30)
    reader = qj.open_checkpoint(artifact[0])
    assert choose.plan_placement(reader, "float32").placement == "device"
    monkeypatch.setattr(choose, "device_memory", lambda: int(3.8 * 2**20))
    plan = choose.plan_placement(reader, "float32")
    assert plan.placement == "host"
    assert "room on the device 0.00 GB, room for experts on the host 0.86 GB" in plan.reason
    monkeypatch.setattr(choose, "device_memory", lambda: 0)
    plan = choose.plan_placement(reader, "float32")
    assert plan.placement == "disk"
    assert "the device does not report its memory" in plan.reason


@pytest.fixture(scope="module")
def copied(artifact, tmp_path_factory):
    path, examples = artifact
    copy = shutil.copytree(path, tmp_path_factory.mktemp("faults") / "model")
    return copy, *qj.load_compressed(copy, experts="disk", expert_cache=3 * EXPERT), batch_of(examples)[0]


@pytest.fixture
def running(copied):
    """(generates, a file of experts that it needs, its parameters); the file is put right afterwards."""
    path, model, params, encoder = copied
    file = next((path / "experts" / "decoder.layers_01").iterdir())
    content = file.read_bytes()
    yield (lambda: np.asarray(qj.generate(model, params, encoder, max_new_tokens=8))), file, params
    if file.is_dir():
        file.rmdir()
    file.write_bytes(content)


class TestFaults:
    """Files that are damaged or replaced while a model runs."""

    @pytest.mark.parametrize(
        ("damage", "problem"),
        [
            (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is cut short"),
            (lambda file: file.write_bytes(file.read_bytes()[:10]), "is cut short"),
            (lambda file: file.write_bytes(file.read_bytes() + b"more"), "is cut short|is too long"),
            (lambda file: file.unlink(), "cannot be read"),
            (lambda file: (file.unlink(), file.mkdir()), "cannot be read|cut short|too long"),
        ],
        ids=["truncated", "almost empty", "longer", "deleted", "a folder"],
    )
    def test_a_damaged_file_is_named_and_generation_works_once_it_is_restored(
        self, running, expected, damage, problem
    ):
        generate, file, _ = running
        content = file.read_bytes()
        damage(file)
        with pytest.raises(qj.CheckpointError, match=problem) as caught:
            generate()
        assert file.name in str(caught.value)
        if file.is_dir():
            file.rmdir()
        file.write_bytes(content)
        np.testing.assert_array_equal(generate(), expected[1])

    def test_counts_that_do_not_match_the_codewords_are_found(self, running):
        generate, file, _ = running
        content = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        content[header + 600 : header + 1400] = bytes(800)  # among the first expert's levels and counts
        file.write_bytes(content)
        with pytest.raises(qj.CheckpointError, match=r"(?s)is damaged.*counts that add up"):
            generate()

    def test_a_call_outside_generate_also_names_the_file(self, running, artifact):
        _, file, params = running
        file.unlink()
        model, _ = qj.load_compressed(artifact[0])
        with pytest.raises(jax.errors.JaxRuntimeError, match=file.name):
            jax.block_until_ready(jax.jit(model.apply)({"params": params}, *batch_of(artifact[1])))

    def test_two_stores_read_one_artifact(self, artifact, expected):
        path, examples = artifact
        for _, params in [qj.load_compressed(path, experts="disk", expert_cache=2 * EXPERT) for _ in "ab"]:
            assert isinstance(stores_of(params)[0], DiskExperts)
            model, _ = qj.load_compressed(path)
            found = qj.generate(model, params, batch_of(examples)[0], max_new_tokens=8)
            assert_same_generation(model, params, batch_of(examples)[0], found, expected[1])
