"""How far back attention looks where it does not look at everything: one rule for all backends.

A KV head with a *reach* of R rows lets query row i read the first ``SINK`` rows and those from
``i // RUN * RUN - R`` up to itself (the attention sink and a local window: StreamingLLM, arXiv 2309.17453; which heads
need no more: DuoAttention, arXiv 2410.10819). The window moves in steps of ``RUN`` rows, counted from the first row of
the context, so that a whole tile of queries reads the same keys and a prompt read in parts gives the same result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

__all__ = ["RUN", "SINK", "Reach", "contiguous", "first_row", "keys_read", "tiles"]

RUN = 128
SINK = 64

Reach = Sequence[int] | None  # rows for each KV head, multiples of SINK, 0: all; None: all for every head


def first_row(reach: int, row: int) -> int:
    """The first row that query ``row`` reads besides the sink; 0 where it reads everything up to itself."""
    first = row // RUN * RUN - reach
    return first if reach and first > SINK else 0


def tiles(places: np.ndarray) -> list[slice]:
    """Rows at ``places`` [T] of a context, ascending, as tiles: contiguous rows of one run of ``RUN``."""
    return _slices((np.diff(places, prepend=-2) != 1) | (places % RUN == 0))


def contiguous(places: np.ndarray) -> list[slice]:
    """Rows at ``places`` [T] of a context, ascending, as slices of rows that follow each other."""
    return _slices(np.diff(places, prepend=-2) != 1)


def _slices(begins: np.ndarray) -> list[slice]:
    edges = [*np.flatnonzero(begins).tolist(), len(begins)]
    return [slice(low, high) for low, high in itertools.pairwise(edges)]


def keys_read(reach: int, rows: int) -> int:
    """How many query-key pairs causal attention of ``rows`` rows over themselves computes, in whole runs."""
    total = 0
    for lo in range(0, rows, RUN):
        hi = min(lo + RUN, rows)
        first = first_row(reach, lo)
        total += (hi - lo) * (hi - first + (SINK if first else 0))
    return total
