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
    return logits_of_each(file, config, [ids], dtype)[0]


def logits_of_each(file: GGUFFile, config: ModelConfig, prompts: list[list[int]], dtype: type) -> list[np.ndarray]:
    """:func:`logits` of each of ``prompts``, which do not see one another; a layer is unpacked once for all of them."""

    def get(name: str) -> np.ndarray:
        return dequantize(file.tensor(name)).astype(dtype)

    def linear(xs: list[np.ndarray], name: str) -> list[np.ndarray]:
        weight = get(f"{name}.weight").T
        bias = get(f"{name}.bias") if f"{name}.bias" in file.tensors else None
        return [x @ weight if bias is None else x @ weight + bias for x in xs]

    def norm(xs: list[np.ndarray], name: str) -> list[np.ndarray]:
        weight = get(f"{name}.weight")
        return [x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + dtype(config.norm_eps)) * weight for x in xs]

    def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        q, k, v = (x.reshape(len(x), -1, config.head_dim) for x in (q, k, v))
        positions = np.arange(len(q))
        a = attention(rotate(q, positions, config, divisors), rotate(k, positions, config, divisors), v)
        return a.reshape(len(q), -1)

    divisors = dequantize(file.tensor("rope_freqs.weight")) if config.rope.scaling == "llama3" else None
    embeddings = get("token_embd.weight")
    xs = [embeddings[ids] for ids in prompts]
    for number in range(config.n_layers):
        blk = f"blk.{number}"
        hs = norm(xs, f"{blk}.attn_norm")
        heads = zip(*(linear(hs, f"{blk}.attn_{name}") for name in "qkv"), strict=True)
        mixed = linear([attended(q, k, v) for q, k, v in heads], f"{blk}.attn_output")
        xs = [x + a for x, a in zip(xs, mixed, strict=True)]
        hs = norm(xs, f"{blk}.ffn_norm")
        gates, ups = linear(hs, f"{blk}.ffn_gate"), linear(hs, f"{blk}.ffn_up")
        gated = [gate / (1 + np.exp(-gate)) * up for gate, up in zip(gates, ups, strict=True)]
        xs = [x + y for x, y in zip(xs, linear(gated, f"{blk}.ffn_down"), strict=True)]
    head = get("output.weight" if "output.weight" in file.tensors else "token_embd.weight").T
    return [x @ head for x in norm(xs, "output_norm")]
