"""Stages that run at once over bounded queues, and the time that each works and waits for another."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from qmoe_jax.settings import own_settings

T = TypeVar("T")


@dataclasses.dataclass
class Stage:
    """One stage's time, in seconds.

    Attributes:
        name: such as "read".
        busy: at work.
        waited: for the stage before it to deliver, or the one behind it to take.
    """

    name: str
    busy: float = 0.0
    waited: float = 0.0

    def times(self) -> dict[str, float]:
        """Return both times, by name."""
        return {"busy": self.busy, "waited": self.waited}

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count the context's time as work, but for what it waits in between."""
        began, waited = time.monotonic(), self.waited
        try:
            yield
        finally:
            self.busy += time.monotonic() - began - (self.waited - waited)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the context's time as waiting."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - began


@dataclasses.dataclass(frozen=True)
class _Failure:
    error: BaseException


_END = object()


@contextlib.contextmanager
def ahead(items: Iterable[T], producer: Stage, consumer: Stage, depth: int) -> Iterator[Iterator[T]]:
    """Yield an iterator over `items`, which a thread makes while the caller works on those before.

    Args:
        items: made in the thread, in order.
        producer: takes the time of making them.
        consumer: takes the time that the caller waits for one.
        depth: items that are made, or in the making, before they are taken, at most.

    Raises:
        Exception: from the iterator, what making an item raised.
    """
    ready: queue.Queue[Any] = queue.Queue()
    room, left = threading.Semaphore(depth), threading.Event()

    def make() -> None:
        with own_settings(matmul_precision=True):
            iterator = iter(items)
            while True:
                with producer.waiting():
                    room.acquire()
                if left.is_set():
                    return
                try:
                    with producer.working():
                        item = next(iterator, _END)
                except BaseException as error:
                    item = _Failure(error)
                ready.put(item)
                if item is _END or isinstance(item, _Failure):
                    return

    def take() -> Iterator[T]:
        while True:
            with consumer.waiting():
                item = ready.get()
            if item is _END:
                return
            if isinstance(item, _Failure):
                raise item.error
            room.release()
            yield item

    thread = threading.Thread(target=make, name=producer.name, daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        left.set()
        room.release()
        thread.join()


class Worker:
    """A thread that does tasks one after another, a context manager that ends when all are done.

    A task that failed is raised by the next call of `submit`, or at the end.
    """

    def __init__(self, stage: Stage, caller: Stage, depth: int):
        """Make a worker.

        Args:
            stage: takes the time of the tasks.
            caller: takes the time that `submit` waits.
            depth: tasks that are not finished, at most; `submit` waits for the oldest where there are more.
        """
        self._stage, self._caller, self._depth = stage, caller, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=stage.name)
        self._pending: list[Future[Any]] = []

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for future in self._pending:
                future.result()

    def submit(self, task: Callable[..., object], *arguments: Any) -> None:
        """Have the thread call `task(*arguments)`. Raises what an earlier task raised."""
        with self._caller.waiting():
            while len(self._pending) >= self._depth:
                self._pending.pop(0).result()
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()
        self._pending.append(self._pool.submit(self._run, task, *arguments))

    def _run(self, task: Callable[..., object], *arguments: Any) -> None:
        with own_settings(matmul_precision=True), self._stage.working():
            task(*arguments)
