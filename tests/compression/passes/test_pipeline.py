"""Stages at once: order is kept, queues are bounded, failures reach the caller, no thread is left behind."""

import threading

import pytest

from qmoe_jax.compression.passes.pipeline import Stage, Worker, ahead


def stages():
    return Stage("producer"), Stage("consumer")


def test_items_come_in_order_while_the_next_are_made():
    made, go_on = [], threading.Event()

    def items():
        for number in range(5):
            made.append(number)
            if number == 2:  # the third
                go_on.set()
            yield number

    with ahead(items(), *stages(), depth=2) as taken:
        assert next(taken) == 0
        assert go_on.wait(10), "the third item is made although the second was not taken"
        assert [*taken] == [1, 2, 3, 4]


def test_no_more_is_made_ahead_than_the_queue_holds():
    made, started = [], threading.Event()

    def items():
        for number in range(100):
            made.append(number)
            started.set()
            yield number

    with ahead(items(), *stages(), depth=2):
        started.wait(10)
    assert len(made) <= 2


def test_a_failure_reaches_the_caller_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("of the disk")

    with ahead(items(), *stages(), depth=2) as taken:
        assert next(taken) == 1
        with pytest.raises(ValueError, match="of the disk"):
            next(taken)


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ahead(iter(int, 1), *stages(), depth=1) as taken:
        next(taken)
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_a_worker_does_its_tasks_in_order_and_finishes_them():
    done = []
    with Worker(*stages(), depth=3) as worker:
        for number in range(10):
            worker.submit(done.append, number)
    assert done == list(range(10))


def test_a_task_that_fails_is_raised_and_ends_the_work():
    def fail():
        raise OSError("full")

    done = []
    with pytest.raises(OSError, match="full"), Worker(*stages(), depth=1) as worker:
        worker.submit(fail)
        for number in range(100):
            worker.submit(done.append, number)
    assert len(done) < 100
    with pytest.raises(OSError, match="full"), Worker(*stages(), depth=1) as worker:
        worker.submit(fail)


def test_waiting_within_work_is_not_counted_as_work(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 7.0])
    monkeypatch.setattr("qmoe_jax.compression.passes.pipeline.time.monotonic", lambda: next(clock))
    stage = Stage("compute")
    with stage.working(), stage.waiting():
        pass
    assert (stage.waited, stage.busy) == (4.0, 3.0)
