"""Parts of a prompt's work: as many rows as take a while, none left out or done twice, no turn while nobody waits."""

from __future__ import annotations

import time

import numpy as np
import pytest

from slimrt import parts
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.parts import Parts


@pytest.mark.parametrize("row_s", [1e-7, 1e-4, 2e-3])
def test_parts_become_as_long_as_they_may(monkeypatch: pytest.MonkeyPatch, row_s: float) -> None:
    now, turns = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    ops = NumpyOps()
    monkeypatch.setattr(ops, "each_alone", True)
    found = Parts(ops)
    found.turn = lambda: turns.append(now[0])
    sizes, at = [], 0
    for _ in range(5):
        at = 0
        for some in found.slices("kind", 8000):
            assert some.start == at
            sizes.append(some.stop - some.start)
            now[0] += sizes[-1] * row_s
            at = some.stop
        assert at == 8000
    wanted = {1e-7: parts._MOST, 1e-4: 768, 2e-3: parts._STEP}[row_s]
    assert sizes[0] == parts._FIRST and wanted in sizes[-4:] and len(turns) == len(sizes)
    assert all(size % parts._STEP == 0 or size >= parts._STEP for size in sizes)
    assert max(sizes[-6:]) <= wanted + parts._STEP  # a remainder of a few rows goes with the part before it


def test_parts_do_not_depend_on_the_clock_where_bits_depend_on_parts() -> None:
    found = Parts(NumpyOps())
    found.turn = lambda: None
    for pause in (0.0, 0.2, 0.0):
        sizes = []
        for some in found.slices("kind", 1600):
            sizes.append(some.stop - some.start)
            time.sleep(pause)
        assert sizes == [parts._FIRST, parts._FIRST, 1600 - 2 * parts._FIRST]


def test_nothing_is_split_while_nobody_waits_and_results_are_put_together() -> None:
    found, x = Parts(NumpyOps()), np.arange(3000, dtype=np.float32).reshape(1500, 2)
    seen: list[slice] = []

    def work(some: slice) -> tuple[np.ndarray, np.ndarray]:
        seen.append(some)
        return x[some] * 2, x[some, :1] + 1

    for split in (False, True):
        found.turn = (lambda: None) if split else None
        seen.clear()
        double, more = found.each("kind", work, len(x))
        assert (len(seen) > 1) is split
        assert np.array_equal(double, x * 2) and np.array_equal(more, x[:, :1] + 1)
    assert np.array_equal(found.each("other", lambda some: x[some] - 1, len(x)), x - 1)
