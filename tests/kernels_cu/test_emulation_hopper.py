"""That the emulation finds what is wrong with wgmma: kernels broken on purpose."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.emulation import SOURCES, EmulationError, compiled, emulation_mode
from tests.kernel_cases import Array, full, half, needs_compiler, noise

pytestmark = needs_compiler

PROBES = Path(__file__).parents[1] / "gpu" / "hopper_probes.cu"
ROUNDS = 7


def broken(source: Path, before: str, after: str, occurrence: int = 0) -> str:
    """The source with one occurrence of ``before`` replaced."""
    parts = source.read_text().split(before)
    assert len(parts) > occurrence + 1, "the kernel has changed: break it elsewhere"
    return before.join(parts[: occurrence + 1]) + after + before.join(parts[occurrence + 1 :])


def relay(code: str) -> tuple[Array, Array]:
    """What ``relay`` makes of whole numbers, and what it should."""
    rng = np.random.default_rng(7)
    a, b = rng.integers(-4, 5, (ROUNDS, 64, 64)).astype(np.float32), rng.integers(-4, 5, (64, 64)).astype(np.float32)
    out, turns = np.full((64, 64), np.nan, np.float32), np.zeros(2, np.int32)
    kernel = compiled(code, {"T": "f16", "COLUMNS": 64, "DEPTH": 64}).kernel("relay")
    kernel((1,), (256,), (half(a), half(b), out, turns, np.int32(ROUNDS)), shared_mem=1024 + 2 * 3 * 64 * 64)
    assert turns.tolist() == [ROUNDS, ROUNDS]
    return out, a.sum(0) @ b.T


def right_in(code: str) -> list[bool]:
    """Whether ``relay`` is right: in deferred and in eager mode, by several orders of the warps."""
    results = []
    for deferred, seed in itertools.product((True, False), range(3)):
        with emulation_mode(deferred=deferred, seed=seed):
            results.append(np.array_equal(*relay(code)))
    return results


def without_turns(code: str) -> str:
    """The relay without its named barriers, which order what barriers in shared memory order too."""
    for turn in (
        "barrier_sync(1",
        "barrier_sync(2",
        "barrier_arrive(2",
        "if (round + 1 < rounds) barrier_arrive(1",
        "barrier_arrive(1",
    ):
        assert f"{turn}, 256);" in code
        code = code.replace(f"{turn}, 256);", "")
    return code


def test_relay_is_right_in_every_mode() -> None:
    assert all(right_in(PROBES.read_text()))
    assert all(right_in(without_turns(PROBES.read_text())))


@pytest.mark.parametrize(
    ("before", "after", "occurrence"),
    [
        ("wgmma_wait<0>();", "", 1),  # reads sums that are not there, frees a tile that is still to be read
        ("wgmma_commit();", "", 1),  # what was not committed is not waited for
        ("mbarrier_wait(full + round % 2, round / 2 & 1);", "", 0),  # multiplies what has yet to arrive
        ("if (round >= 2) mbarrier_wait(free + round % 2, (round / 2 - 1) & 1);", "", 0),  # overwrites what is in use
        ("(round / 2 - 1) & 1", "round / 2 & 1", 0),  # the wrong phase
        ("column % LINE / 8 ^ row % 8", "column % LINE / 8 ^ row % 4", 0),  # not the swizzle of the descriptor
    ],
)
def test_a_broken_relay_is_wrong(before: str, after: str, occurrence: int) -> None:
    """Numbers are wrong, or one side gets so far ahead that the other waits for a phase that is over."""
    try:
        right = all(right_in(without_turns(broken(PROBES, before, after, occurrence))))
    except EmulationError as error:
        assert "deadlock" in str(error)
    else:
        assert not right


@pytest.mark.parametrize(
    ("before", "after", "occurrence", "error"),
    [
        ("            fence_async_proxy();\n", "", 0, "without fence.proxy.async"),
        ("cp_async_wait<0>();", "", 0, "without fence.proxy.async"),
        ("wgmma_fence();", "", 3, "no wgmma.fence"),
        ("barrier_arrive(2, 256);", "", 0, "deadlock"),
        ("mbarrier_arrive(full + round % 2);", "", 0, "deadlock"),
        ("if (round + 1 < rounds) barrier_arrive(1, 256);", "barrier_arrive(1, 256);", 0, "left with arrivals"),
        ("mbarrier_init(full + threadIdx.x, 128);", "", 0, "before it was initialised"),
        ("tile_descriptor(tiles, 0)", "tile_descriptor(tiles + 9 * 64 * LINE, 0)", 0, "outside the shared memory"),
    ],
)
def test_misuse_is_an_error(before: str, after: str, occurrence: int, error: str) -> None:
    with pytest.raises(EmulationError, match=error):
        relay(broken(PROBES, before, after, occurrence))


def attend(code: str) -> Array:
    """What a source of the kernel makes of four tiles of keys."""
    q, k, v = (half(noise(shape, seed)) for seed, shape in enumerate([(130, 1, 64), (1, 500, 64), (1, 500, 64)]))
    out = half(np.full(q.shape, np.nan, np.float32))
    kernel = compiled(code, {"T": "f16", "DH": 64, "STAGES": 2}).kernel("attention_wgmma")
    kernel.max_dynamic_shared_size_bytes = shared = 2 * 64 * (128 + 256 * 2) + 1152
    sizes = (*(np.int32(n) for n in (130, 500, 1, 1, 64, 500 * 64)), np.uintp(0), np.float32(0))
    kernel((1, 2), (384,), (q, k, v, out, np.uintp(0), *sizes), shared_mem=shared)
    return full(out)


ATTENTION = SOURCES / "attention_wgmma.cu"


@pytest.mark.parametrize(
    ("before", "after", "occurrence"),
    [
        ("wgmma_wait<1>();", "", 0),  # a softmax of scores that are not there
        ("wgmma_wait<1>();\n", "release(keys_free, step); wgmma_wait<1>();\n", 0),  # keys are free while they are read
        ("wgmma_wait<0>();\n            settled(mixed);", "settled(mixed);", 0),  # new weights under a running product
        ("(chunk ^ (row & 7))", "(chunk ^ (row & 3))", 0),
        ("            fence_async_proxy();\n            if", "            if", 0),
    ],
)
def test_broken_attention_is_seen(before: str, after: str, occurrence: int) -> None:
    with emulation_mode(deferred=True):
        right = attend(ATTENTION.read_text())
        try:
            wrong = attend(broken(ATTENTION, before, after, occurrence))
        except EmulationError as error:
            assert "without fence.proxy.async" in str(error)
            return
    assert np.isfinite(right).all()
    assert not np.abs(right - wrong).max() < 0.01
