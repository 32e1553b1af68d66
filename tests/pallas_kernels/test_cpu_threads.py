"""A loop shared between threads runs every chunk once, whoever is busy, and raises what a thread raised."""

import threading
import time

import numpy as np
import pytest

from pallas_kernels.cpu import threads
from pallas_kernels.cpu.compiled import compiled
from pallas_kernels.cpu.threads import next_chunk, parallel_for


@compiled
def count_chunks(counter, counts):
    chunk = next_chunk(counter)
    while chunk < len(counts):
        counts[chunk] += 1
        chunk = next_chunk(counter)


@pytest.mark.parametrize("chunks", [0, 1, 1000])
def test_parallel_for_runs_every_chunk_once(chunks):
    counts = np.zeros(chunks, np.int64)
    parallel_for(count_chunks, counts)
    assert (counts == 1).all()


def test_parallel_for_raises_what_a_thread_raised():
    def fail(counter):
        raise ValueError("a torn row")

    with pytest.raises(ValueError, match="a torn row"):
        parallel_for(fail)


def test_parallel_for_does_not_wait_for_helpers_that_are_busy_elsewhere():
    release, started = threading.Event(), threading.Event()

    def hold(counter):
        started.set()
        release.wait(10)

    holder = threading.Thread(target=parallel_for, args=(hold,))
    holder.start()
    started.wait(10)
    done = []
    parallel_for(lambda counter: done.append(threading.get_ident()))
    release.set()
    holder.join()
    assert threading.get_ident() in done


@pytest.mark.parametrize("interrupted", ["while it works", "while it waits"])
def test_no_thread_works_on_after_an_interruption(interrupted, monkeypatch):
    """Ctrl-C once left helpers writing into results that their caller had freed."""
    monkeypatch.setattr(threads, "NUM_THREADS", 2)
    caller, working, ended = threading.get_ident(), threading.Event(), []

    def body(counter):
        if threading.get_ident() == caller:
            working.wait(10)
            if interrupted == "while it works":
                raise KeyboardInterrupt
        else:
            working.set()
            while counter[0] < 2**61:
                time.sleep(0.001)
            ended.append(True)

    real_wait, calls = threads.concurrent.futures.wait, []

    def wait(helpers):
        calls.append(helpers)
        if len(calls) == 1 and interrupted == "while it waits":
            raise KeyboardInterrupt
        return real_wait(helpers)

    monkeypatch.setattr(threads.concurrent.futures, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        parallel_for(body)
    assert ended == [True]
