"""Experts on disk, behind a cache of a given size in host memory: the routed ones are read when they are needed.

A layer's tokens are grouped by expert first, so that no expert is read twice in a step. Missing experts are read in
the order in which they lie on the disk, several at once, while those that are there already are multiplied; an expert
that has not been used for longest gives its slot up. A layer that needs more experts than the cache has slots takes
them in turns.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from qmoe_jax.artifact.reader import ExpertLayer
from qmoe_jax.inference.placement.slots import SlotLayout, SlotPool, SlotRead
from qmoe_jax.inference.placement.source import PlacedSource
from qmoe_jax.inference.placement.statistics import ExpertStatistics
from qmoe_jax.inference.placement.store import ExpertStore, LayerKey, Matrices, picked

READERS = 8
"""Threads that read."""

READS_IN_FLIGHT = 4
"""A few large reads are split until there are as many: one thread alone fills neither a disk nor memory's bandwidth."""


class ExpertCache:
    """Which expert is in which slot of a pool, and which to give up next."""

    def __init__(self, pool: SlotPool):
        self.pool = pool
        self._slot_of: collections.OrderedDict[tuple[LayerKey, int], int] = collections.OrderedDict()
        self._free = list(range(pool.slots))[::-1]

    def find(self, layer: LayerKey, expert: int) -> int | None:
        """The expert's slot, now the last to be given up; None where the expert is not there."""
        slot = self._slot_of.get((layer, expert))
        if slot is not None:
            self._slot_of.move_to_end((layer, expert))
        return slot

    def take(self) -> tuple[int, bool]:
        """A slot to read into, and whether an expert was given up for it."""
        if self._free:
            return self._free.pop(), False
        return self._slot_of.popitem(last=False)[1], True

    def put(self, layer: LayerKey, expert: int, slot: int) -> None:
        """Says that the expert has been read into the slot."""
        self._slot_of[layer, expert] = slot

    def clear(self) -> None:
        """Gives all experts up."""
        self._free += self._slot_of.values()
        self._slot_of.clear()

    def give_back(self, slot: int) -> None:
        """Says that a slot taken holds nothing."""
        self._free.append(slot)


class DiskExperts(ExpertStore):
    """The experts of an artifact, `budget` bytes of them at most in memory."""

    def __init__(self, source: PlacedSource, activation: str, budget: int):
        """Reads the headers of all expert files.

        Raises:
          CheckpointError: a file is missing or damaged.
          ValueError: the budget has no room for one expert.
        """
        self._source = source
        self._caches = _caches(source, budget)
        pools = {id(cache): cache.pool for cache in self._caches.values()}.values()
        super().__init__(activation, ExpertStatistics("disk", sum(pool.nbytes for pool in pools)))
        self._readers = ThreadPoolExecutor(READERS, "expert-reader")

    def clear(self) -> None:
        """Empties the cache, as after loading."""
        with self._lock:
            for cache in {id(cache): cache for cache in self._caches.values()}.values():
                cache.clear()

    def _run(
        self, layer: LayerKey, x: np.ndarray, expert: np.ndarray, scale: np.ndarray, y: np.ndarray
    ) -> None:
        matrices = self.matrices(layer)
        needed, which = np.unique(expert, return_inverse=True)
        with contextlib.closing(self._bring_all(layer, needed)) as brought:
            for slot_of in brought:
                self._run_ready(matrices, slot_of, (needed, which), (x, scale, y))

    def _hand_out(self, layer: LayerKey, experts: np.ndarray) -> Matrices:
        stored = self.matrices(layer)
        handed = picked(stored, np.zeros(len(experts), np.int32))
        needed, which = np.unique(experts, return_inverse=True)
        with contextlib.closing(self._bring_all(layer, needed)) as brought:
            for expert, slot in itertools.chain.from_iterable(slot_of.items() for slot_of in brought):
                to = which == np.searchsorted(needed, expert)
                for name, matrix in stored.items():
                    for part in ("codes", "row_offsets", "levels"):
                        getattr(handed[name], part)[to] = getattr(matrix, part)[slot]
        return handed

    def matrices(self, layer: LayerKey) -> Matrices:
        """The slots of the layer's cache."""
        return self._caches[layer].pool.packed(self._source.tables[layer])

    def _bring_all(self, layer: LayerKey, needed: np.ndarray) -> Generator[dict[int, int]]:
        """The slots of some experts, as many at a time as are ready; in turns where they are more than there is room
        for, so that a slot holds its expert until the next ones are asked for."""
        cache = self._caches[layer]
        self.statistics.uses += len(needed)
        for start in range(0, len(needed), cache.pool.slots):
            turn = needed[start : start + cache.pool.slots].tolist()
            yield from self._bring(layer, cache, turn)

    def _run_ready(
        self,
        matrices: Matrices,
        slot_of: dict[int, int],
        tokens: tuple[np.ndarray, np.ndarray],
        data: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> None:
        """Multiplies the experts that are in these slots with all of their tokens."""
        (needed, which), (x, scale, y) = tokens, data
        slots = np.full(len(needed), -1, np.int32)
        slots[np.searchsorted(needed, list(slot_of))] = list(slot_of.values())
        slot = slots[which]
        if (slot >= 0).all():
            self._multiply(matrices, x, slot, scale, y)
            return
        mine = np.flatnonzero(slot >= 0)
        part = np.empty((len(mine), y.shape[1]), np.float32)
        self._multiply(matrices, x[mine], slot[mine], scale[mine], part)
        y[mine] = part

    def _bring(self, layer: LayerKey, cache: ExpertCache, experts: list[int]) -> Generator[dict[int, int]]:
        """The slots of some experts, as many at a time as are ready; those in memory first."""
        ready = {expert: slot for expert in experts if (slot := cache.find(layer, expert)) is not None}
        missing = [expert for expert in experts if expert not in ready]
        self.statistics.hits += len(ready)
        pending: _Pending = {}
        try:
            self._start(layer, cache, missing, pending)
            if ready:
                yield ready
            while pending:
                yield {expert: self._finish(layer, cache, expert, pending) for expert in self._next(pending)}
        finally:
            # Whatever happened: no thread may still write into a slot that another expert will get.
            wait([future for _, _, futures in pending.values() for future in futures])
            for slot, _, _ in pending.values():
                cache.give_back(slot)

    def _start(self, layer: LayerKey, cache: ExpertCache, experts: Sequence[int], pending: _Pending) -> None:
        """Begins to read experts, in the order of their places on the disk, and notes each in `pending`."""
        stored: ExpertLayer = self._source.layers[layer]
        extents = sorted((stored.extent(expert) for expert in experts), key=lambda e: (e.path, e.offset))
        pieces = -(-READS_IN_FLIGHT // max(1, len(extents)))
        for extent in extents:
            slot, evicted = cache.take()
            self.statistics.evictions += evicted
            read = cache.pool.fill(slot, extent)
            futures = [self._readers.submit(part.run) for part in read.read.split(pieces)]
            pending[extent.expert] = slot, read, futures

    def _next(self, pending: _Pending) -> list[int]:
        """The experts that have been read, at least one of them."""
        began = time.perf_counter()
        while True:
            done = [expert for expert, (_, _, futures) in pending.items() if all(f.done() for f in futures)]
            if done:
                self.statistics.waited += time.perf_counter() - began
                return done
            going = [future for _, _, futures in pending.values() for future in futures if not future.done()]
            wait(going, return_when=FIRST_COMPLETED)

    def _finish(self, layer: LayerKey, cache: ExpertCache, expert: int, pending: _Pending) -> int:
        """The slot of an expert that has been read. Raises `CheckpointError` where that went wrong."""
        slot, read, futures = pending[expert]
        for future in futures:
            future.result()
        read.finish()
        del pending[expert]
        cache.put(layer, expert, slot)
        self.statistics.reads += 1
        self.statistics.bytes_read += read.read.size
        return slot


_Pending = dict[int, tuple[int, SlotRead, list[Future]]]
"""Experts being read: the slot of each, what to do when it is there, and what reads it."""


def _caches(source: PlacedSource, budget: int) -> dict[LayerKey, ExpertCache]:
    """A cache for all layers whose experts are packed alike (all of them, as a rule); the budget is shared evenly.

    Raises:
      ValueError: a cache has no room for one expert.
    """
    shapes: list[tuple[SlotLayout, list[LayerKey]]] = []
    for key, layer in source.layers.items():
        layout = SlotLayout.of(layer.files())
        for index, (other, keys) in enumerate(shapes):
            if layout.similar(other):
                shapes[index] = layout.join(other), [*keys, key]
                break
        else:
            shapes.append((layout, [key]))
    caches: dict[LayerKey, ExpertCache] = {}
    for layout, keys in shapes:
        experts = sum(source.layers[key].num_experts for key in keys)
        share = budget * len(keys) // len(source.layers)
        slots = min(share // layout.nbytes, experts)
        if slots < 1:
            raise ValueError(
                f"expert cache: expected at least {layout.nbytes * len(source.layers) // len(keys):,} bytes (room for "
                f"one expert), found {budget:,}"
            )
        caches |= dict.fromkeys(keys, ExpertCache(SlotPool(layout, slots)))
    return caches
