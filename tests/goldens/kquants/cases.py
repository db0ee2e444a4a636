"""Weights on which quantisers are compared, and how their errors are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType

from slimrt.weights.gguf import GGUFFile

KINDS = (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K)
_KINDS_OF_TENSORS = (
    "token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip


def random_cases() -> dict[str, np.ndarray]:
    """float32 [128, 512] each."""
    rng = np.random.default_rng(0)
    shape = (128, 512)
    return {
        "normal": (rng.standard_normal(shape) * 0.02).astype(np.float32),
        "heavy tails": rng.standard_t(4, shape).astype(np.float32),
        "one sign": (1 + rng.random(shape)).astype(np.float32),
    }


def of_the_model(path: Path) -> dict[str, np.ndarray]:
    """float32 [128, 512] of each kind of tensor of the default model, from its middle layer."""
    file = GGUFFile(path)  # gguf's own reader takes seconds for the vocabulary
    found = {}
    for kind in _KINDS_OF_TENSORS:
        tensor = file.tensor("token_embd.weight" if kind == "token_embd" else f"blk.15.{kind}.weight")
        rows = gguf.dequantize(tensor.data[:128], tensor.type)
        found[kind] = np.ascontiguousarray(rows[:, :512], np.float32)
    return found


def importance(columns: int) -> np.ndarray:
    """How much each column counts: mean squares as layers' inputs have them, a few columns far above the rest."""
    return np.exp(2 * np.random.default_rng(1).standard_normal(columns)).astype(np.float32)


def errors(x: np.ndarray, y: np.ndarray, kind: GGMLQuantizationType, counts: np.ndarray | None = None) -> list[float]:
    """Root mean square error; and weighted, as llama.cpp's quantiser of ``kind`` counts it, or by ``counts``."""
    square = np.square(x.astype(np.float64) - y)
    if counts is not None:
        weights = np.broadcast_to(counts.astype(np.float64), x.shape)
    elif kind == GGMLQuantizationType.Q6_K:
        weights = np.square(x.astype(np.float64))
    else:
        parts = np.square(x.astype(np.float64)).reshape(-1, 32).mean(1, keepdims=True)
        weights = (np.sqrt(parts) + np.abs(x.reshape(-1, 32))).reshape(x.shape)
    return [float(np.sqrt(square.mean())), float(np.sqrt((weights * square).sum() / weights.sum()))]


MIXED: dict[str, dict[str, Any]] = {
    "32 layers": {"layers": 32, "width": 256},
    "5 layers, tied": {"layers": 5, "width": 256, "tied": True},
    "rows of 288": {"layers": 9, "width": 288},
    "rows of 288, tied": {"layers": 2, "width": 288, "tied": True},
    "8 experts": {"layers": 12, "width": 256, "experts": 8},
    "4 experts": {"layers": 12, "width": 256, "experts": 4},
    "80 layers": {"layers": 80, "width": 256},
}
"""Models whose mixes are compared: arguments of ``mixed_shapes``."""

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def mixed_shapes(layers: int, width: int, *, tied: bool = False, experts: int = 0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, four query heads to one KV head."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, width), "output_norm.weight": (width,)}
    if not tied:
        found["output.weight"] = (64, width)
    for layer in range(layers):
        found[f"blk.{layer}.attn_norm.weight"] = found[f"blk.{layer}.ffn_norm.weight"] = (width,)
        for part in LINEAR:
            rows = width // 4 if part in ("attn_k", "attn_v") else width
            if experts and part.startswith("ffn"):
                found[f"blk.{layer}.{part}_exps.weight"] = (experts, rows, width)
            else:
                found[f"blk.{layer}.{part}.weight"] = (rows, width)
        if experts:
            found[f"blk.{layer}.ffn_gate_inp.weight"] = (experts, width)
    return found
