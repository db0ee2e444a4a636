"""From the layouts of Transformers' checkpoints to those of GGUF."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from slimrt.convert.checkpoint import Rows, StoredTensor, permute_heads
from slimrt.convert.hyperparameters import Hyperparameters

__all__ = ["in_gguf_layout", "split_joint"]

Parts = dict[str, list[StoredTensor]]


def in_gguf_layout(name: str, rows: Rows, n_rows: int, sizes: Hyperparameters) -> Rows:
    """``rows`` of the tensor with the GGUF name ``name``: heads reordered, norms shifted, queries scaled."""
    family, part = sizes.family, name.split(".")[-2]
    if family.permuted and part in ("attn_q", "attn_k"):
        rows = permute_heads(rows, n_rows, sizes.n_heads if part == "attn_q" else sizes.n_kv_heads)
    shift = family.norm_shift if part.endswith("_norm") else 0.0
    scaled = "attn_q_norm" if family.qk_norm != "none" else "attn_q"
    scale = sizes.query_scale if part == scaled else 1.0
    if not shift and scale == 1:
        return rows
    plain = rows
    return lambda start, stop: (plain(start, stop) + np.float32(shift)) * np.float32(scale)


def split_joint(named: Parts, sizes: Hyperparameters) -> Parts:
    """Tensors that checkpoints hold as one and GGUF apart: experts' gate and up, InternLM's Q, K and V."""
    result: Parts = {}
    for name, parts in named.items():
        block, part = name.rpartition(".weight")[0].rpartition(".")[::2]
        stored = parts[0]
        if part in ("ffn_gate_up_exps", "ffn_down_exps") and len(parts) == 1 and len(stored.shape) == 3:
            experts, rows, columns = stored.shape
            halves = ("ffn_gate_exps", "ffn_up_exps") if part == "ffn_gate_up_exps" else (part,)
            step = rows // len(halves)
            for number, half in enumerate(halves):
                result[f"{block}.{half}.weight"] = [
                    _rows(stored, expert * rows + number * step, step, columns) for expert in range(experts)
                ]
        elif part == "attn_qkv" and sizes.family.grouped_qkv and len(stored.shape) == 2:
            width, group = sizes.head_dim, sizes.n_heads // sizes.n_kv_heads
            for half, first, heads in (("attn_q", 0, group), ("attn_k", group, 1), ("attn_v", group + 1, 1)):
                result[f"{block}.{half}.weight"] = [
                    _rows(stored, (number * (group + 2) + first) * width, heads * width, stored.shape[1])
                    for number in range(stored.shape[0] // ((group + 2) * width))
                ]
        else:
            result[name] = parts
    return result


def _rows(tensor: StoredTensor, first: int, count: int, columns: int) -> StoredTensor:
    """``count`` rows of ``columns`` from row ``first`` on, of a tensor seen as a matrix of such rows."""
    stride = columns if len(tensor.shape) > 2 else tensor.row_stride
    size = {"F64": 8, "F32": 4}.get(tensor.kind, 2)
    assert math.prod(tensor.shape[1:]) % columns == 0
    return dataclasses.replace(
        tensor, shape=(count, columns), offset=tensor.offset + first * stride * size, row_stride=stride
    )
