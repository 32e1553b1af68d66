"""A loop shared between threads runs every chunk once, whoever is busy, and raises what a thread raised."""

import threading

import numpy as np
import pytest

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
