"""Arrays that end where an unmapped page begins, so that a read or write behind them ends the process."""

import ctypes
import mmap

import numpy as np


def at_the_end_of_a_page(array: np.ndarray) -> np.ndarray:
    """A copy right before a page that must not be touched."""
    pages = mmap.mmap(-1, -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE)
    end = len(pages) - mmap.PAGESIZE
    last_page = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + end
    no_access = 0
    assert (
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(last_page), ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
    )
    view = np.frombuffer(pages, np.uint8)[end - array.nbytes : end].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view
