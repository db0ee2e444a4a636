"""A slow, obvious forward pass in any precision: what the engine's results are held against.

Written from the LLaMA and Qwen2 papers and the GGUF layout, token by token where that is plainest, sharing nothing with
slimrt's arithmetic but the readers of files. Run in float64 it is the truth; in float32 its error is the unit in which
tolerances are given: a result may err by a few times what a naive float32 computation errs.
"""

from __future__ import annotations

import numpy as np

from slimrt.config import ModelConfig
from slimrt.weights.gguf import GGUFFile
from slimrt.weights.quants import dequantize


def rotate(x: np.ndarray, positions: np.ndarray, config: ModelConfig, divisors: np.ndarray | None) -> np.ndarray:
    """x [T, heads, Dh] turned by its positions: plain, linear and llama3 scaling."""
    rope, result = config.rope, x.copy()
    for i in range(rope.dims // 2):
        frequency = rope.base ** (-2 * i / rope.dims)
        if divisors is not None:
            frequency /= float(divisors[i])
        if rope.scaling == "linear":
            frequency /= rope.factor
        angle = positions.astype(np.float64) * frequency
        cos, sin = np.cos(angle).astype(x.dtype)[:, None], np.sin(angle).astype(x.dtype)[:, None]
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + rope.dims // 2)
        result[..., a] = x[..., a] * cos - x[..., b] * sin
        result[..., b] = x[..., a] * sin + x[..., b] * cos
    return result


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention by index: q [T, H, Dh], k and v [N, Hkv, Dh] -> [T, H, Dh]."""
    tokens, heads, width = q.shape
    keys, kv_heads = k.shape[:2]
    out = np.empty_like(q)
    for head in range(heads):
        kv = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, kv].T / np.sqrt(np.array(width, q.dtype))
        scores[np.arange(keys)[None, :] > (keys - tokens + np.arange(tokens))[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights @ v[:, kv] / weights.sum(axis=1, keepdims=True)
    return out


def logits(file: GGUFFile, config: ModelConfig, ids: list[int], dtype: type) -> np.ndarray:
    """Logits [T, V] of every token of ``ids``, all arithmetic in ``dtype``."""

    def get(name: str) -> np.ndarray:
        return dequantize(file.tensor(name)).astype(dtype)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        y = x @ get(f"{name}.weight").T
        return y + get(f"{name}.bias") if f"{name}.bias" in file.tensors else y

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + dtype(config.norm_eps)) * get(f"{name}.weight")

    positions = np.arange(len(ids))
    divisors = dequantize(file.tensor("rope_freqs.weight")) if config.rope.scaling == "llama3" else None
    x = get("token_embd.weight")[ids]
    for number in range(config.n_layers):
        blk = f"blk.{number}"
        h = norm(x, f"{blk}.attn_norm")
        q = linear(h, f"{blk}.attn_q").reshape(len(ids), config.n_heads, config.head_dim)
        k = linear(h, f"{blk}.attn_k").reshape(len(ids), config.n_kv_heads, config.head_dim)
        v = linear(h, f"{blk}.attn_v").reshape(len(ids), config.n_kv_heads, config.head_dim)
        a = attention(rotate(q, positions, config, divisors), rotate(k, positions, config, divisors), v)
        x = x + linear(a.reshape(len(ids), -1), f"{blk}.attn_output")
        h = norm(x, f"{blk}.ffn_norm")
        gate = linear(h, f"{blk}.ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{blk}.ffn_up"), f"{blk}.ffn_down")
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    return norm(x, "output_norm") @ get(head).T
