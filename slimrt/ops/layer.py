"""The three row-wise parts of a layer in terms of a backend's operations: what they mean, and how they run in slices.

A backend derives from ``LayerOps`` and may replace a part by something quicker that means the same.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LayerOps"]

Array = Any  # the backend's array
Weight = Any  # the backend's handle


class LayerOps:
    """For backends with ``rows``, ``whole_rows``, ``empty``, ``kv_type``, ``rmsnorm``, ``linear``, ``add_linear``,
    ``rope`` and ``swiglu``."""

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
        """Norm, stacked projection, RoPE: x [T, D] -> q [T, H, Dh], k and v [T, Hkv, Dh], these as the cache keeps
        them.

        ``heads``: H, Hkv, Dh. The rows of ``weight`` [(H + 2 Hkv) Dh, D] are those of q, k, v.
        """
        count, kv_count, width = heads

        def part(x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
            joint = self.linear(self.rmsnorm(x, gain, eps), weight, bias)
            joint = joint.reshape(len(x), count + 2 * kv_count, width)
            self.rope(joint[:, : count + kv_count], cos, sin)
            return joint[:, :count], joint[:, count:-kv_count], joint[:, -kv_count:]

        if len(x) <= self.whole_rows:
            return part(x, cos, sin)
        q = self.empty((len(x), count, width))
        k = self.empty((len(x), kv_count, width), self.kv_type)
        v = self.empty((len(x), kv_count, width), self.kv_type)

        def rows(at: slice) -> None:
            q[at], k[at], v[at] = part(x[at], cos[at], sin[at])

        self.rows(rows, len(x))
        return q, k, v

    def project(self: Any, x: Array, attention: Array, weight: Weight, bias: Array | None) -> Array:
        """x [T, D] and attention [T, H, Dh] -> x + attention @ weight.T (+ bias) [T, D]."""
        attention = attention.reshape(len(x), -1)
        if len(x) <= self.whole_rows:
            return self.add_linear(x, attention, weight, bias)
        result = self.empty(x.shape, x.dtype)

        def rows(at: slice) -> None:
            result[at] = self.add_linear(x[at], attention[at], weight, bias)

        self.rows(rows, len(x))
        return result

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
        """x [T, D] -> x + down(silu(gate) * up) of the normed x [T, D]; gate_up [2 F, D] with gate first."""

        def part(x: Array) -> Array:
            hidden = self.swiglu(self.linear(self.rmsnorm(x, gain, eps), gate_up, gate_up_bias))
            return self.add_linear(x, hidden, down, down_bias)

        if len(x) <= self.whole_rows:
            return part(x)
        result = self.empty(x.shape, x.dtype)

        def rows(at: slice) -> None:
            result[at] = part(x[at])

        self.rows(rows, len(x))
        return result
