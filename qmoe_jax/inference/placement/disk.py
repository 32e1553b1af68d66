"""Experts on disk, behind a least-recently-used cache of fixed size in host memory.

A layer's tokens are grouped by expert first, so that no expert is read twice in a step. Missing experts are
read in the order of their offsets, several at once, while experts that are already in memory are multiplied.
A layer that needs more experts than the cache has slots processes them in rounds.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from qmoe_jax.artifact.reader import ExpertLayer
from qmoe_jax.inference.placement.slots import SlotLayout, SlotPool, SlotRead
from qmoe_jax.inference.placement.source import PlacedSource
from qmoe_jax.inference.placement.statistics import ExpertStatistics
from qmoe_jax.inference.placement.store import ExpertStore, LayerKey, Matrices, take_experts

READERS = 8
"""Reader threads: enough parallel requests to keep a fast disk busy."""

READS_IN_FLIGHT = 4
"""Reads are split into at least this many: one thread saturates neither disk nor memory bandwidth."""


class _PendingRead(NamedTuple):
    """An expert that is being read: its slot, the read to finish, and the futures of its parts."""

    slot: int
    read: SlotRead
    futures: list[Future[None]]


class _Tokens(NamedTuple):
    """Operands of one layer, with its tokens' distinct experts and, per token, the position among them."""

    x: Float32[np.ndarray, "t embed"]
    scale: Float32[np.ndarray, "t"]
    y: Float32[np.ndarray, "t embed"]
    experts: Int32[np.ndarray, "distinct"]
    which: Int64[np.ndarray, "t"]


class ExpertCache:
    """Map from experts to the slots of a pool, with least-recently-used eviction."""

    def __init__(self, pool: SlotPool):
        self.pool = pool
        self._slot_of: collections.OrderedDict[tuple[LayerKey, int], int] = collections.OrderedDict()
        self._free = list(range(pool.slots))[::-1]

    def find(self, layer: LayerKey, expert: int) -> int | None:
        """Return the expert's slot and mark it as most recently used; None if the expert is not cached."""
        slot = self._slot_of.get((layer, expert))
        if slot is not None:
            self._slot_of.move_to_end((layer, expert))
        return slot

    def acquire(self) -> tuple[int, bool]:
        """Return a slot to read into, and whether an expert was evicted for it."""
        if self._free:
            return self._free.pop(), False
        return self._slot_of.popitem(last=False)[1], True

    def put(self, layer: LayerKey, expert: int, slot: int) -> None:
        """Record that the expert has been read into the slot."""
        self._slot_of[layer, expert] = slot

    def clear(self) -> None:
        """Evict all experts."""
        self._free += self._slot_of.values()
        self._slot_of.clear()

    def release(self, slot: int) -> None:
        """Return an acquired slot that holds no expert."""
        self._free.append(slot)


class DiskExperts(ExpertStore):
    """The experts of an artifact on disk, with at most `budget` bytes of them in memory."""

    def __init__(self, source: PlacedSource, activation: str, budget: int):
        """Read the headers of all expert files and allocate the cache.

        Raises:
            CheckpointError: a file is missing or damaged.
            ValueError: the budget is too small for one expert.
        """
        self._source = source
        self._caches = _caches(source, budget)
        pools = {id(cache): cache.pool for cache in self._caches.values()}.values()
        super().__init__(activation, ExpertStatistics("disk", sum(pool.nbytes for pool in pools)))
        self._readers = ThreadPoolExecutor(READERS, "expert-reader")

    def clear(self) -> None:
        """Empty the cache, as after loading."""
        with self._lock:
            for cache in {id(cache): cache for cache in self._caches.values()}.values():
                cache.clear()

    def _run(
        self, layer: LayerKey, x: np.ndarray, expert: np.ndarray, scale: np.ndarray, y: np.ndarray
    ) -> None:
        matrices = self.matrices(layer)
        needed, which = np.unique(expert, return_inverse=True)
        tokens = _Tokens(x, scale, y, needed, which)
        with contextlib.closing(self._fetch_all(layer, needed)) as fetched:
            for slot_of in fetched:
                self._run_ready(matrices, slot_of, tokens)

    def _gather(self, layer: LayerKey, experts: np.ndarray) -> Matrices:
        stored = self.matrices(layer)
        gathered = take_experts(stored, np.zeros(len(experts), np.int32))
        needed, which = np.unique(experts, return_inverse=True)
        with contextlib.closing(self._fetch_all(layer, needed)) as fetched:
            for expert, slot in itertools.chain.from_iterable(slot_of.items() for slot_of in fetched):
                to = which == np.searchsorted(needed, expert)
                for name, matrix in stored.items():
                    for part in ("codes", "row_offsets", "levels"):
                        getattr(gathered[name], part)[to] = getattr(matrix, part)[slot]
        return gathered

    def matrices(self, layer: LayerKey) -> Matrices:
        """Return the slots of the layer's cache."""
        return self._caches[layer].pool.packed(self._source.tables[layer])

    def _fetch_all(self, layer: LayerKey, needed: np.ndarray) -> Generator[dict[int, int]]:
        """Yield the slot of each expert, as many at a time as are ready.

        Experts that exceed the slots are fetched in rounds; a slot keeps its expert until the next item is
        requested.
        """
        cache = self._caches[layer]
        self.statistics.lookups += len(needed)
        for start in range(0, len(needed), cache.pool.slots):
            yield from self._fetch(layer, cache, needed[start : start + cache.pool.slots].tolist())

    def _run_ready(self, matrices: Matrices, slot_of: dict[int, int], tokens: _Tokens) -> None:
        """Multiply the experts in these slots with all of their tokens."""
        x, scale, y = tokens.x, tokens.scale, tokens.y
        slots = np.full(len(tokens.experts), -1, np.int32)
        slots[np.searchsorted(tokens.experts, list(slot_of))] = list(slot_of.values())
        slot = slots[tokens.which]
        if (slot >= 0).all():
            self._multiply(matrices, x, slot, scale, y)
            return
        ready = np.flatnonzero(slot >= 0)
        part = np.empty((len(ready), y.shape[1]), np.float32)
        self._multiply(matrices, x[ready], slot[ready], scale[ready], part)
        y[ready] = part

    def _fetch(self, layer: LayerKey, cache: ExpertCache, experts: list[int]) -> Generator[dict[int, int]]:
        """Yield the slot of each expert, as many at a time as are ready; those in memory first."""
        ready = {expert: slot for expert in experts if (slot := cache.find(layer, expert)) is not None}
        missing = [expert for expert in experts if expert not in ready]
        self.statistics.hits += len(ready)
        pending: dict[int, _PendingRead] = {}
        try:
            self._start(layer, cache, missing, pending)
            if ready:
                yield ready
            while pending:
                yield {expert: self._finish(layer, cache, expert, pending) for expert in self._next(pending)}
        finally:
            # Even after an error: no thread may still write into a slot that another expert will get.
            wait([future for read in pending.values() for future in read.futures])
            for read in pending.values():
                cache.release(read.slot)

    def _start(
        self, layer: LayerKey, cache: ExpertCache, experts: Sequence[int], pending: dict[int, _PendingRead]
    ) -> None:
        """Start reading experts in the order of their offsets on disk, and add each to `pending`."""
        stored: ExpertLayer = self._source.layers[layer]
        extents = sorted((stored.extent(expert) for expert in experts), key=lambda e: (e.path, e.offset))
        pieces = -(-READS_IN_FLIGHT // max(1, len(extents)))
        for extent in extents:
            slot, evicted = cache.acquire()
            self.statistics.evictions += evicted
            read = cache.pool.fill(slot, extent)
            futures = [self._readers.submit(part.run) for part in read.read.split(pieces)]
            pending[extent.expert] = _PendingRead(slot, read, futures)

    def _next(self, pending: dict[int, _PendingRead]) -> list[int]:
        """Wait until at least one expert has been read, and return those that have been."""
        began = time.perf_counter()
        while True:
            done = [expert for expert, read in pending.items() if all(f.done() for f in read.futures)]
            if done:
                self.statistics.io_wait_seconds += time.perf_counter() - began
                return done
            running = [future for read in pending.values() for future in read.futures if not future.done()]
            wait(running, return_when=FIRST_COMPLETED)

    def _finish(
        self, layer: LayerKey, cache: ExpertCache, expert: int, pending: dict[int, _PendingRead]
    ) -> int:
        """Finish a read and return the expert's slot.

        Raises:
            CheckpointError: the file is missing, cut short or damaged.
        """
        slot, read, futures = pending[expert]
        for future in futures:
            future.result()
        read.finish()
        del pending[expert]
        cache.put(layer, expert, slot)
        self.statistics.reads += 1
        self.statistics.bytes_read += read.read.size
        return slot


def smallest_cache(source: PlacedSource) -> int:
    """Return the bytes of the smallest cache that a model runs with: one expert of each layout."""
    shapes = _shapes(source)
    return max((-(-layout.nbytes * len(source.layers) // len(keys)) for layout, keys in shapes), default=0)


def _shapes(source: PlacedSource) -> list[tuple[SlotLayout, list[LayerKey]]]:
    """Return a layout for the layers whose experts have similar layouts, and these layers."""
    shapes: list[tuple[SlotLayout, list[LayerKey]]] = []
    for key, layer in source.layers.items():
        layout = SlotLayout.of(layer.files())
        for index, (other, keys) in enumerate(shapes):
            if layout.similar(other):
                shapes[index] = layout.join(other), [*keys, key]
                break
        else:
            shapes.append((layout, [key]))
    return shapes


def _caches(source: PlacedSource, budget: int) -> dict[LayerKey, ExpertCache]:
    """Return the cache of each layer.

    Layers whose experts have similar layouts (usually all) share a cache; the budget is split in proportion
    to layers.

    Raises:
        ValueError: the budget is too small for one expert.
    """
    caches: dict[LayerKey, ExpertCache] = {}
    for layout, keys in _shapes(source):
        experts = sum(source.layers[key].num_experts for key in keys)
        share = budget * len(keys) // len(source.layers)
        slots = min(share // layout.nbytes, experts)
        if slots < 1:
            raise ValueError(
                f"expert_cache: expected at least {layout.nbytes * len(source.layers) // len(keys):,} bytes "
                f"(one expert), found {budget:,}"
            )
        caches |= dict.fromkeys(keys, ExpertCache(SlotPool(layout, slots)))
    return caches
