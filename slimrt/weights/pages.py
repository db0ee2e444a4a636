"""Pages of a mapped file that are not wanted any more."""

from __future__ import annotations

import mmap

import numpy as np

__all__ = ["let_go"]


def let_go(data: np.ndarray) -> None:
    """Give back the memory in which the bytes of ``data`` lie, if it is a view of a mapped file; else do nothing.

    The system reads them again if somebody asks for them. Where it has no such call (Windows) they stay until memory is
    short.
    """
    whole: object = data
    while isinstance(whole, np.ndarray):
        whole = whole.base
    if isinstance(whole, memoryview):
        whole = whole.obj
    if not isinstance(whole, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    begins = np.frombuffer(whole, np.uint8).__array_interface__["data"][0]
    first = data.__array_interface__["data"][0] - begins
    start = first // mmap.PAGESIZE * mmap.PAGESIZE
    whole.madvise(mmap.MADV_DONTNEED, start, first + data.nbytes - start)
