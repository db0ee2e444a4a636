"""Rotary angles: plain, linear, YaRN and LLaMA 3's frequency divisors."""

from __future__ import annotations

import math

import numpy as np

from slimrt.config import RopeConfig


class RopeTable:
    """cos and sin of any positions for one model.

    The angles are taken in float64: at position 100,000 a float32 product would be off by 0.006 rad.
    """

    def __init__(self, config: RopeConfig, divisors: np.ndarray | None = None) -> None:
        """``divisors`` [dims/2]: the file's ``rope_freqs`` tensor (LLaMA 3), by which frequencies are divided."""
        frequencies = config.base ** (-np.arange(0, config.dims, 2, dtype=np.float64) / config.dims)
        if divisors is not None:
            frequencies = frequencies / divisors.astype(np.float64)
        self.gain = config.attn_factor
        if config.scaling == "linear":
            frequencies = frequencies / config.factor
        elif config.scaling == "yarn":
            stay = _yarn_ramp(config) * config.ext_factor
            frequencies = frequencies * stay + frequencies / config.factor * (1 - stay)
            if config.ext_factor:
                self.gain *= 1 + 0.1 * math.log(config.factor)
        self.frequencies = frequencies

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions [T] -> cos, sin [T, dims/2] float32, scaled by YaRN's attention gain."""
        angles = positions.astype(np.float64)[:, None] * self.frequencies
        return (np.cos(angles) * self.gain).astype(np.float32), (np.sin(angles) * self.gain).astype(np.float32)


def _yarn_ramp(config: RopeConfig) -> np.ndarray:
    """How much of each frequency stays unscaled: 1 for fast ones, 0 for slow ones (YaRN, section 3.2)."""

    def dimension(turns: float) -> float:
        # In logarithms: the quotient itself leaves the floating-point numbers where a file states absurd turns.
        ratio = math.log(config.original_ctx) - math.log(turns) - math.log(2 * math.pi)
        return config.dims * ratio / (2 * math.log(config.base))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.whole_ramp:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0, low), min(config.dims - 1, high)
    ramp = (np.arange(config.dims // 2) - low) / max(0.001, high - low)
    return 1 - np.clip(ramp, 0, 1)
