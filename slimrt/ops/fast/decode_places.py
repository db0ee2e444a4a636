"""Where the rows of a layer's tokens go in their caches, and what they see there: what changes from step to step."""

from __future__ import annotations

import weakref

import numpy as np

from slimrt.ops.fast.team import address

__all__ = ["LayerPlaces"]


class LayerPlaces:
    """What of one layer changes from step to step: where the rows of its tokens go and what they see."""

    def __init__(self, places: np.ndarray, seen: np.ndarray, attend: np.ndarray, job: int, window: int) -> None:
        self.places, self.seen = places, seen  # int64 [most, PLACE], [most, SEEN]: see the kernels
        self.attend = attend  # the words of its attention
        self.job = job  # number of the attention's job in the program
        self.window = window  # of the layer, 0: it sees everything
        self._stores: list[weakref.ref[np.ndarray] | None] = [None] * len(places)  # whose addresses the rows hold

    def place(self, rows: slice, store: np.ndarray) -> None:
        """The tokens of ``rows`` write to and read from ``store`` [2, Hkv, capacity, Dh]."""
        if all(held is not None and held() is store for held in self._stores[rows]):
            return
        self.write_to(rows, store)
        self.read_from(rows, *store)
        self._stores[rows] = [weakref.ref(store)] * (rows.stop - rows.start)

    def write_to(self, rows: slice, store: np.ndarray) -> None:
        """New rows go to ``store`` [2, Hkv, capacity, Dh]."""
        self._stores[rows] = [None] * (rows.stop - rows.start)
        keys, values = store
        self.places[rows, :3] = address(keys), address(values), keys.strides[0]

    def read_from(self, rows: slice, keys: np.ndarray, values: np.ndarray) -> None:
        """Attention reads ``keys``, ``values`` [Hkv, N, Dh]."""
        self.seen[rows, 3:] = address(keys), address(values), keys.strides[0], values.strides[0]

    def skip(self, rows: slice, held: np.ndarray, before: int) -> None:
        """The tokens of ``rows``, behind the first ``before`` rows of the layer, which are at positions ``held``, see
        those within its window only."""
        own = held[before : before + rows.stop - rows.start]
        self.seen[rows, 1] = np.searchsorted(held, own - self.window + 1)
