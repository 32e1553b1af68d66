"""`expert_mlp` on NumPy arrays: slots of a cache, any thread, any number of tokens."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest

from pallas_kernels.cpu import threads
from pallas_kernels.cpu.mlp import expert_mlp
from tests.helpers import packed_samples as samples

BOOK = samples.CODEBOOKS["tunstall-8"]()
WI, WO = samples.sample(BOOK, (3, 50, 90)), samples.sample(BOOK, (3, 90, 50), seed=1)


def run(wi, wo, x, expert_index, activation="relu"):
    y = np.full_like(x, np.nan)
    scale = np.linspace(0.5, 1, len(x), dtype=np.float32)
    expert_mlp((wi,), wo, x, expert_index, scale, y, activation=activation)
    return y


def wanted(x, expert_index, activation="relu"):
    scale = np.linspace(0.5, 1, len(x), dtype=np.float32)
    hidden = samples.products(WI, x, expert_index)[0]
    hidden = np.maximum(hidden, 0) if activation == "relu" else hidden
    return scale[:, None] * samples.products(WO, hidden, expert_index)[0]


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 90)).astype(np.float32), rng.integers(0, 3, count).astype(np.int32)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 17, 33, 64, 65, 200])
@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_expert_mlp_computes_any_number_of_tokens(count, activation):
    x, _ = tokens(count)
    expert_index = np.ones(count, np.int32)
    found = run(WI.packed, WO.packed, x, expert_index, activation)
    np.testing.assert_allclose(found, wanted(x, expert_index, activation), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, 70])
def test_codewords_behind_an_experts_last_row_are_ignored(count):
    """A slot of a cache has room for the longest expert: behind a shorter one, an earlier one's are left."""
    x, expert_index = tokens(count)
    found = []
    for seed in range(2):
        rng, slots = np.random.default_rng(seed), []
        for packed in (WI.packed, WO.packed):
            codes = rng.integers(0, 256, (3, packed.codes.shape[1] + 100)).astype(np.uint8)
            for expert, count_ in enumerate(packed.row_offsets[:, -1]):
                codes[expert, :count_] = packed.codes[expert, :count_]
            slots.append(dataclasses.replace(packed, codes=codes))
        found.append(run(*slots, x, expert_index))
    np.testing.assert_array_equal(*found)


def test_expert_mlp_gives_the_same_bits_one_expert_at_a_time():
    x, expert_index = tokens(20)
    together = run(WI.packed, WO.packed, x, expert_index)
    scale, y = np.linspace(0.5, 1, 20, dtype=np.float32), np.empty_like(x)
    for expert in range(3):
        mine = expert_index == expert
        part = np.empty_like(x[mine])
        only = [
            dataclasses.replace(
                p, codes=p.codes[[expert]], row_offsets=p.row_offsets[[expert]], levels=p.levels[[expert]]
            )
            for p in (WI.packed, WO.packed)
        ]
        zeros = np.zeros(mine.sum(), np.int32)
        expert_mlp((only[0],), only[1], x[mine], zeros, scale[mine], part, activation="relu")
        y[mine] = part
    np.testing.assert_array_equal(y, together)


def test_expert_mlp_may_be_called_from_several_threads_at_once():
    inputs = [tokens(40, seed) for seed in range(4)]
    alone = [run(WI.packed, WO.packed, *each) for each in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda each: run(WI.packed, WO.packed, *each), inputs)
            for one, other in zip(alone, found, strict=True):
                np.testing.assert_array_equal(one, other)


def test_expert_mlp_gives_the_same_bits_on_any_number_of_threads(monkeypatch):
    x, expert_index = tokens(40)
    found = []
    for count in range(1, threads.NUM_THREADS + 1):
        monkeypatch.setattr(threads, "NUM_THREADS", count)
        found.append(run(WI.packed, WO.packed, x, expert_index))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
