"""attention_wgmma.cu on the CPU: the problems of attention_prefill, and the same limits of error."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernel_cases import NULL, Array, assert_as_exact, full, half, launch, mode, needs_compiler, noise
from tests.kernels_cu.test_kernels_attention import PREFILL, anywhere, attention, inputs, starts_of

__all__ = ["mode"]
pytestmark = needs_compiler

VARIANT = {"STAGES": 1, "PING_PONG": 0}
CASES = [
    *((*sizes, kind, reach, {}) for *sizes, _, _, kind, reach in PREFILL),
    (200, 520, 4, 2, 64, "f16", None, VARIANT),
    (300, 700, 4, 2, 64, "f16", (0, 128), VARIANT),
]


def run(
    q: Array, k: Array, v: Array, keys: int, kind: str, reach: tuple[int, ...] | None = None,
    starts: object = NULL, cap: float = 0.0, spans: Array | None = None, **macros: int,
) -> Array:  # fmt: skip
    """q [T, H, Dh], which may be a part of wider rows, over the first ``keys`` rows of k and v [Hkv, N, Dh]."""
    (tokens, heads, dh), macros = q.shape, {"STAGES": 2, **macros}
    out = half(np.full(q.shape, np.nan, np.float32), kind)
    launch(
        "attention_wgmma.cu",
        {"T": kind, "DH": dh, **macros},
        "attention_wgmma",
        (heads, (keys - 1) // 128 - (keys - tokens) // 128 + 1 if spans is None else len(spans) // 2),
        384,
        [
            *(q, k, v, out, NULL if reach is None else np.array(reach, np.int32)),
            *(tokens, keys, heads, len(k), q.strides[0] // 2, k[0].size, starts, cap),
            *([] if spans is None else [spans]),
        ],
        shared=2 * dh * (128 + 256 * macros["STAGES"]) + 1152,
    )
    return full(out)


@pytest.mark.parametrize(("tokens", "keys", "heads", "kv_heads", "dh", "kind", "reach", "macros"), CASES)
def test_prefill(
    tokens: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dh: int,
    kind: str,
    reach: tuple[int, ...] | None,
    macros: dict[str, int],
) -> None:
    q, k, v = inputs(tokens, keys, heads, kv_heads, dh, kind, spare=5)
    joint = np.zeros((tokens, heads + 1, dh), q.dtype)
    joint[:, :heads] = q
    out = run(joint[:, :heads], k, v, keys, kind, reach, **macros)
    arrays = full(q), full(k[:, :keys]), full(v[:, :keys])
    assert_as_exact(out, attention(*arrays, reach, kind), attention(*arrays, reach))


@pytest.mark.parametrize(("kind", "dh"), [("f16", 64), ("bf16", 128)])
def test_tiles_of_rows_anywhere(kind: str, dh: int) -> None:
    """With the bits that a pass of all rows gives them."""
    q, k, v = inputs(520, 520, 2, 1, dh, kind, spare=5)
    places, spans = anywhere(2)
    found = run(q[places], k, v, 520, kind, spans=spans, PLACED=1)
    assert np.array_equal(found, run(q, k, v, 520, kind)[places])


@pytest.mark.parametrize(("tokens", "keys", "window"), [(300, 300, 40), (130, 700, 333), (70, 70, 0)])
def test_windows_and_caps(tokens: int, keys: int, window: int) -> None:
    q, k, v = inputs(tokens, keys, 2, 1, 64, "f16", spare=5)
    starts = starts_of(tokens, keys, window) if window else NULL
    out = run(q, k, v, keys, "f16", starts=starts, cap=2.0, WINDOWED=1, CAPPED=1)
    arrays = full(q), full(k[:, :keys]), full(v[:, :keys])
    exact, naive = (attention(*arrays, None, kind, window, 2.0) for kind in (None, "f16"))
    assert_as_exact(out, naive, exact)


def test_prefill_survives_scores_far_apart() -> None:
    """Scores of thousands that grow with every key: the running maximum moves all the time, nothing may overflow."""
    q, k, v = noise((196, 1, 64), 1), noise((1, 196, 64), 2), noise((1, 196, 64), 3)
    q[..., 0] = 120
    k[..., 0] = 200 + np.arange(196) / 8
    q, k, v = half(q), half(k), half(v)
    arrays = full(q), full(k), full(v)
    assert_as_exact(run(q, k, v, 196, "f16"), attention(*arrays, None, "f16"), attention(*arrays, None))
