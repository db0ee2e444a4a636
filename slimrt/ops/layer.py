"""The arithmetic of a LLaMA layer but for attention, in plain lines: what every backend computes.

Each part treats every row alone, so it runs in slices (``by_rows``). A backend derives from ``LayerOps`` and may
replace a part by something quicker that means the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from slimrt.ops.protocol import Array, Weight

__all__ = ["LayerOps"]


class LayerOps:
    """For backends with ``rows``, ``whole_rows``, ``empty``, ``rmsnorm``, ``linear``, ``add_linear``, ``rope`` and
    ``swiglu``."""

    def qkv(
        self: Any,
        x: Array,
        gain: Array,
        eps: float,
        weight: Weight,
        bias: Array | None,
        cos: Array,
        sin: Array,
        heads: tuple[int, int, int],
    ) -> tuple[Array, Array, Array]:
        """Norm, stacked projection, RoPE: x [T, D] -> q [T, H, Dh], k and v [T, Hkv, Dh], k rotated as well.

        ``heads``: H, Hkv, Dh. The rows of ``weight`` [(H + 2 Hkv) Dh, D] are those of q, k, v.
        """
        count, kv_count, width = heads

        def part(x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
            joint = self.linear(self.rmsnorm(x, gain, eps), weight, bias).reshape(len(x), -1, width)
            q, k, v = joint[:, :count], joint[:, count:-kv_count], joint[:, -kv_count:]
            self.rope(joint[:, : count + kv_count], cos, sin)  # q and k, in place
            return q, k, v

        return self.by_rows(part, x, cos, sin)

    def project(self: Any, x: Array, attention: Array, weight: Weight, bias: Array | None) -> Array:
        """Output projection and residual: x [T, D], attention [T, H, Dh] -> x + attention @ weight.T (+ bias)."""

        def part(x: Array, attention: Array) -> tuple[Array]:
            return (self.add_linear(x, attention, weight, bias),)

        return self.by_rows(part, x, attention.reshape(len(x), -1))[0]

    def feed_forward(
        self: Any,
        x: Array,
        gain: Array,
        eps: float,
        gate_up: Weight,
        gate_up_bias: Array | None,
        down: Weight,
        down_bias: Array | None,
    ) -> Array:
        """Norm, gated feed-forward, residual: x [T, D] -> x + down(silu(gate) * up); gate_up [2 F, D], gate first."""

        def part(x: Array) -> tuple[Array]:
            hidden = self.swiglu(self.linear(self.rmsnorm(x, gain, eps), gate_up, gate_up_bias))
            return (self.add_linear(x, hidden, down, down_bias),)

        return self.by_rows(part, x)[0]

    def by_rows(self: Any, part: Callable[..., tuple[Array, ...]], *rows: Array) -> tuple[Array, ...]:
        """``part(*rows)``, where there are many rows in slices of them, as the backend's ``rows`` cuts and runs them.

        ``rows`` and what ``part`` returns have one entry a token in front.
        """
        count = len(rows[0])
        if count <= self.whole_rows:
            return part(*rows)
        whole: list[Array] = []
        lock = threading.Lock()  # slices may run at once

        def run(at: slice) -> None:
            results = part(*(array[at] for array in rows))
            with lock:
                if not whole:
                    whole.extend(self.empty((count, *result.shape[1:]), result.dtype) for result in results)
            for array, result in zip(whole, results, strict=True):
                array[at] = result

        self.rows(run, count)
        return tuple(whole)
