"""Hidden states on disk: what is written comes back in either order, and damage is never taken for states."""

import pathlib

import numpy as np
import pytest

from qmoe_jax.compression.tokens.slabs import TokenOrder
from qmoe_jax.compression.tokens.store import PartWriter, TokenStore, part_names, remove_store
from qmoe_jax.files.errors import CheckpointError

FEATURES, GROUPS = 6, 5
RNG = np.random.default_rng(0)
SLABS = [(RNG.standard_normal((n, FEATURES), np.float32), RNG.integers(0, GROUPS, n)) for n in (40, 1, 25)]


@pytest.fixture
def folder(tmp_path):
    """Two parts, as two hosts write them."""
    for name, numbers in {"a": (0, 1), "b": (2,)}.items():
        writer = PartWriter(tmp_path / "store", name)
        for number in numbers:
            writer.append_slab(number, *SLABS[number])
        writer.finish(kept=np.array(numbers))
    return tmp_path / "store"


def test_slabs_come_back_in_their_order(folder):
    store = TokenStore(folder, part_names(folder), FEATURES)
    for number, (x, group) in enumerate(SLABS):
        np.testing.assert_array_equal(store.read_slab(number, group), x)
    assert store.arrays["b"]["kept"].tolist() == [2]


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_groups_come_back_slab_after_slab(folder, rows):
    store = TokenStore(folder, ["a", "b"], FEATURES)
    for number in range(GROUPS):
        pieces = [p for slab in store.slabs(number) for p in store.pieces(number, slab, rows)]
        expected = np.concatenate([x[group == number] for x, group in SLABS])
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
        assert max(map(len, pieces)) <= rows


def test_a_segment_may_be_written_in_pieces(tmp_path):
    x = SLABS[0][0]
    writer = PartWriter(tmp_path, "part")
    for start in range(0, len(x), 9):
        writer.append(3, 1, x[start : start + 9])
    writer.append(3, 1, x[:0])
    writer.append(4, 1, x[:2])
    writer.finish()
    store = TokenStore(tmp_path, ["part"], FEATURES)
    assert [store.segments[slab, 1].rows for slab in store.slabs(1)] == [40, 2]
    np.testing.assert_array_equal(next(store.pieces(1, 3, 100)), x)


def test_a_part_without_its_index_is_not_there(tmp_path):
    PartWriter(tmp_path, "part").append(0, 0, SLABS[0][0])
    assert part_names(tmp_path) == []
    writer = PartWriter(tmp_path, "part")
    writer.finish()
    assert part_names(tmp_path) == ["part"]
    PartWriter(tmp_path, "part")  # begins it anew
    assert part_names(tmp_path) == []


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-1])])
@pytest.mark.parametrize("name", ["b", "b.index"])
def test_damage_is_named(folder, name, damage):
    damage(folder / name)
    with pytest.raises(CheckpointError) as raised:
        TokenStore(folder, ["a", "b"], FEATURES).verify()
    assert raised.value.path == str(folder / name)


def test_a_removed_store_leaves_nothing(folder):
    remove_store(folder)
    assert not folder.exists()
    remove_store(folder)


LENGTHS = [3, 70, 64, 1, 130, 65, 20]
CONTEXTS = [200, 5, 64, 65, 128, 1, 300]


@pytest.fixture(params=[1 << 28, 3000], ids=["one slab", "many slabs"])
def order(request, monkeypatch):
    monkeypatch.setattr("qmoe_jax.compression.tokens.slabs.SLAB_BYTES", request.param)
    return TokenOrder.of(LENGTHS, CONTEXTS, heads=2, row_bytes=8)


def test_every_token_is_in_one_slab(order):
    numbers = np.concatenate([order.numbers(slab) for slab in order.slabs])
    assert sorted(numbers) == list(range(sum(LENGTHS)))
    assert order.tokens == sum(LENGTHS)
    assert [slab.number for slab in order.slabs] == list(range(len(order.slabs)))


def test_tokens_are_placed_in_their_examples(order):
    starts = np.cumsum(LENGTHS) - LENGTHS
    for slab in order.slabs:
        for token, number in enumerate(order.numbers(slab), slab.start):
            example, position = order.place(token)
            assert starts[example] + position == number


def test_batches_of_one_shape_hold_their_examples(order):
    for slab in order.slabs:
        for batch in slab.batches:
            assert batch.mask.sum() == batch.tokens == sum(LENGTHS[e] for e in batch.examples)
            assert (batch.length % 64, batch.context % 64) == (0, 0)
            x = np.arange(2.0 * batch.tokens, dtype=np.float32).reshape(-1, 2)
            np.testing.assert_array_equal(batch.pad(x)[batch.mask], x)


def test_the_order_of_tokens_does_not_depend_on_slabs(monkeypatch):
    orders = []
    for size in (1 << 28, 3000):
        monkeypatch.setattr("qmoe_jax.compression.tokens.slabs.SLAB_BYTES", size)
        order = TokenOrder.of(LENGTHS, CONTEXTS, heads=2, row_bytes=8)
        orders.append(np.concatenate([order.numbers(slab) for slab in order.slabs]))
    np.testing.assert_array_equal(*orders)


def test_attention_weights_bound_the_rows_of_a_batch(monkeypatch):
    monkeypatch.setattr("qmoe_jax.compression.tokens.slabs.ATTENTION_BYTES", 4 * 2 * 64 * 64 * 3)
    order = TokenOrder.of([60] * 7, None, heads=2, row_bytes=8)
    assert [len(batch.examples) for slab in order.slabs for batch in slab.batches] == [3, 3, 1]
    assert {batch.rows for slab in order.slabs for batch in slab.batches} == {3}
