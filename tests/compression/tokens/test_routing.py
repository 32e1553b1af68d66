"""Selection of calibration tokens, and batches of hidden states."""

import dataclasses
import json

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.compression.tokens.routing import Routing, calibrating, keep_decoder, keep_encoder
from qmoe_jax.compression.tokens.slabs import TokenOrder
from qmoe_jax.data import Sentinels
from qmoe_jax.inference.blockwise.states import HiddenStates, mask_of, plan_batches


def test_masks_of_calibration_tokens_match_upstream(data):
    golden = json.loads((data / "data_mlm.json").read_text())
    for name, keep in (("encoder", keep_encoder), ("decoder", keep_decoder)):
        for tokens, expected in zip(golden[name], golden[f"keep_mask_{name}"], strict=True):
            np.testing.assert_array_equal(keep(np.array(tokens), 32000), np.array(expected, bool))


def test_an_expert_is_calibrated_by_its_first_tokens_only():
    expert = np.array([0, 1, 0, 0, 1, 0, 0, 0])
    keep = np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)
    # 0.75 even shares of 4 are 3 tokens: of expert 0 the first three, of which one is not kept
    np.testing.assert_array_equal(np.flatnonzero(calibrating(expert, keep, 2, 0.75)), [0, 1, 3, 4])


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_the_first_tokens_are_the_same_however_many_are_counted_at_a_time(monkeypatch, block):
    monkeypatch.setattr("qmoe_jax.compression.tokens.routing.BLOCK", block)
    rng = np.random.default_rng(0)
    expert, keep = rng.integers(0, 6, 200), rng.random(200) < 0.9
    found = calibrating(expert, keep, 6, 0.8)
    for number in range(6):
        mine = np.flatnonzero(expert == number)
        chosen = mine[: int(0.8 * 200 / 6)]
        np.testing.assert_array_equal(np.flatnonzero(found & (expert == number)), chosen[keep[chosen]])


def test_calibrating_tokens_are_the_first_in_the_order_of_the_examples():
    """Batches go by length; an expert that has more tokens than calibrate takes the first of the examples."""
    order = TokenOrder.of([100, 10], None, heads=1, row_bytes=4)  # the second example comes first
    routing = Routing.select(
        order, np.zeros(110, np.uint16), np.ones(110, np.float32), np.ones(110, bool), 1, token_cap=0.5
    )
    assert not routing.calibrates[:10].any()
    np.testing.assert_array_equal(np.flatnonzero(routing.calibrates), np.arange(10, 65))


def test_a_group_has_its_experts_tokens():
    expert = np.array([3, 0, 2, 3, 1, 2], np.uint16)
    routing = Routing(expert, np.arange(6, dtype=np.float32), np.array([1, 1, 0, 1, 1, 1], bool))
    group = routing.of_group(range(2, 4))
    assert (group.numbers.tolist(), group.expert.tolist()) == ([0, 2, 3, 5], [1, 0, 1, 0])
    assert (group.routed, group.calibration) == ((2, 2), (1, 2))


@pytest.mark.parametrize("memory_share", [0.25, 0.0], ids=["in memory", "in a file"])
def test_hidden_states_survive_gathering_and_scattering_batches(tmp_path, monkeypatch, memory_share):
    monkeypatch.setattr("qmoe_jax.inference.blockwise.states.MEMORY_SHARE", memory_share)
    lengths = [3, 70, 64, 1, 130, 65]
    states = HiddenStates(lengths, 5, tmp_path)
    states.values[:] = np.random.default_rng(0).standard_normal(states.values.shape)
    expected = states.values.copy()
    seen = []
    for batch in plan_batches(states.lengths):
        padded = states.gather(batch)
        assert padded.shape[1] % 64 == 0
        mask = mask_of(batch, states.lengths)
        np.testing.assert_array_equal(padded[mask], expected[states.flat(batch)])
        assert (padded[~mask] == 0).all()
        states.scatter(batch, 2 * padded)
        seen += batch.examples.tolist()
    assert sorted(seen) == list(range(len(lengths)))
    np.testing.assert_array_equal(states.values, 2 * expected)
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass(frozen=True)
class FakeTokenizer:
    """The part of a tokenizer that options are taken from."""

    sentinels: Sentinels
    vocab_size: int
    path: str = "sp.model"


def test_the_first_sentinel_is_the_tokenizers():
    tokenizer = FakeTokenizer(Sentinels((300, 302, 301)), 303)
    assert qj.CompressionConfig().with_sentinels(tokenizer).sentinel_start == 300
    assert qj.CompressionConfig(sentinel_start=300).with_sentinels(tokenizer).sentinel_start == 300
    with pytest.raises(ValueError, match=r"sentinel_start: expected 300, .* sp.model, found 301"):
        qj.CompressionConfig(sentinel_start=301).with_sentinels(tokenizer)


@pytest.mark.parametrize(("ids", "size"), [((300, 302), 303), ((300, 301), 303)])
def test_sentinels_below_other_ids_are_refused_unless_they_calibrate(ids, size):
    tokenizer = FakeTokenizer(Sentinels(ids), size)
    with pytest.raises(ValueError, match=r"sp.model: expected sentinels with the highest ids"):
        qj.CompressionConfig().with_sentinels(tokenizer)
    kept = qj.CompressionConfig(keep_sentinels=True)
    assert kept.with_sentinels(tokenizer) == kept


def test_the_first_sentinel_of_the_published_vocabulary_is_known():
    assert qj.CompressionConfig().first_sentinel(qj.PRESETS["switch-c-2048"]) == 32000
