"""An expert on NumPy arrays: slots of a cache, any thread, any number of tokens, nothing left over from before."""

import concurrent.futures
import dataclasses
import threading

import numpy as np
import pytest

from pallas_kernels.cpu import compiled
from pallas_kernels.cpu.mlp import expert_mlp
from pallas_kernels.cpu.threads import share
from pallas_kernels.cpu.token_blocks import MAX_LANES, grouped
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
def test_every_number_of_tokens(count, activation):
    x, _ = tokens(count)
    expert_index = np.ones(count, np.int32)
    found = run(WI.packed, WO.packed, x, expert_index, activation)
    np.testing.assert_allclose(found, wanted(x, expert_index, activation), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, 70])
def test_what_lies_behind_a_slots_codewords_does_not_matter(count):
    """A cache keeps the longest expert's room for each: what an earlier one left there differs from slot to slot."""
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


def test_one_expert_at_a_time_is_the_same_bit_for_bit():
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


def test_threads_may_call_at_once():
    inputs = [tokens(40, seed) for seed in range(4)]
    alone = [run(WI.packed, WO.packed, *each) for each in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda each: run(WI.packed, WO.packed, *each), inputs)
            for one, other in zip(alone, found, strict=True):
                np.testing.assert_array_equal(one, other)


def test_the_number_of_threads_changes_no_bit():
    x, expert_index = tokens(40)
    before, found = compiled.threads(), []
    try:
        for count in range(1, compiled.MOST_THREADS + 1):
            compiled.set_threads(count)
            found.append(run(WI.packed, WO.packed, x, expert_index))
    finally:
        compiled.set_threads(before)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_errors_of_the_shared_work_reach_the_caller():
    def fail(taken):
        raise ValueError("a torn row")

    with pytest.raises(ValueError, match="a torn row"):
        share(fail)


def test_work_is_done_where_no_helper_comes():
    """Helpers that are busy elsewhere are not waited for."""
    release, started = threading.Event(), threading.Event()

    def hold(taken):
        started.set()
        release.wait(10)

    holder = threading.Thread(target=share, args=(hold,))
    holder.start()
    started.wait(10)
    done = []
    share(lambda taken: done.append(threading.get_ident()))
    release.set()
    holder.join()
    assert threading.get_ident() in done


def test_blocks_hold_every_token_once_beside_those_of_its_expert():
    expert_index = np.repeat(np.arange(9), [1, 2, 8, 9, 16, 17, 33, 64, 150]).astype(np.int32)
    np.random.default_rng(0).shuffle(expert_index)
    blocks = grouped(expert_index)
    assert sorted(blocks.token) == list(range(300))
    for block, expert in enumerate(blocks.expert):
        inside = blocks.token[blocks.bound[block] : blocks.bound[block + 1]]
        assert (expert_index[inside] == expert).all()
        assert 0 < len(inside) <= blocks.lanes[block] <= max(8, 2 * len(inside) - 1) <= 2 * MAX_LANES


@pytest.mark.parametrize("width", [1, 15, 513])
def test_collecting_reverses_spreading(width):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((150, width)).astype(np.float32)
    blocks = grouped((rng.integers(0, 12, 150) ** 2).astype(np.int32))
    y = np.full_like(x, np.nan)
    blocks.collect(blocks.spread(x), np.full(150, 2, np.float32), y)
    np.testing.assert_array_equal(y, 2 * x)
