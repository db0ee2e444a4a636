"""Models of a well-known shape with random weights: speed does not depend on what the weights are.

One layer's tensors serve for all layers; each layer has its own copy where the model computes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slimrt.config import ModelConfig, RopeConfig
from slimrt.errors import ModelFileError, SettingError
from slimrt.weights.gguf import TensorInfo

__all__ = ["SHAPES", "SyntheticModel", "random_tensor"]


def _config(
    name: str, layers: int, d_model: int, heads: int, kv_heads: int, width: int, d_ff: int, vocab: int, ctx: int
) -> ModelConfig:
    q, kv = heads * width, kv_heads * width
    matrices = layers * d_model * (2 * q + 2 * kv + 3 * d_ff) + 2 * vocab * d_model
    return ModelConfig(
        name=name,
        arch="llama",
        n_layers=layers,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=width,
        d_ff=d_ff,
        vocab_size=vocab,
        ctx_train=ctx,
        norm_eps=1e-5,
        rope=RopeConfig(base=5e5, dims=width, interleaved=False),  # the layout behind the seam: nothing to reorder
        n_params=matrices + (2 * layers + 1) * d_model,
    )


SHAPES = {
    "llama-3.1-8b": _config("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
    "smollm2-135m": _config("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, 8192),
    "tiny": _config("tiny", 4, 128, 4, 2, 64, 160, 256, 4096),
}

# Byte offsets of the half-precision scales in a block (ggml-common.h): random bits there may be NaN.
_SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "IQ4_XS": (0,),
    "IQ3_S": (0,),
}
_LARGEST = {
    "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4096,
    "Q2_K": 45, "Q3_K": 128, "IQ4_XS": 4064, "IQ3_S": 465,
}  # fmt: skip


def random_tensor(name: str, kind: str, shape: tuple[int, int], rng: np.random.Generator) -> TensorInfo:
    """A matrix of type ``kind`` whose values have a size of about 1 / sqrt(columns).

    Raises SettingError for a type that is not one of F32, F16, BF16 and the common block types.
    """
    size = 1 / np.sqrt(shape[1])
    if kind in ("F32", "F16", "BF16"):
        row = (rng.standard_normal(1 << 16) * size).astype(np.float32)  # repeated: drawing 10^9 numbers takes a minute
        values = np.resize(row, shape)
        if kind == "F16":
            values = values.astype(np.float16)
        elif kind == "BF16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return TensorInfo(name, shape, GGMLQuantizationType[kind], values)
    if kind not in _SCALES:
        raise SettingError(f"type {kind!r}: must be one of F32, F16, BF16, {', '.join(_SCALES)}")
    type_ = GGMLQuantizationType[kind]
    elements, block = GGML_QUANT_SIZES[type_]
    if shape[1] % elements:
        raise SettingError(
            f"type {kind}: rows of {shape[1]} do not divide into blocks of {elements}; take another type"
        )
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // elements, block), np.uint8)
    scale = np.array([2 * size / _LARGEST[kind]], np.float16).view(np.uint8)
    for at in _SCALES[kind]:
        blocks[:, at : at + 2] = scale
    return TensorInfo(name, shape, type_, blocks.reshape(shape[0], -1))


class SyntheticModel:
    """What ``Llama`` asks of a model file, for ``config`` with matrices of type ``kind``."""

    def __init__(self, config: ModelConfig, kind: str, seed: int = 0) -> None:
        self.config, self.path = config, Path(f"{config.name}-{kind}-random")
        c, rng = config, np.random.default_rng(seed)
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        layer = {
            "attn_q": (q, c.d_model),
            "attn_k": (kv, c.d_model),
            "attn_v": (kv, c.d_model),
            "attn_output": (c.d_model, q),
            "ffn_gate": (c.d_ff, c.d_model),
            "ffn_up": (c.d_ff, c.d_model),
            "ffn_down": (c.d_model, c.d_ff),
        }
        shared = {name: random_tensor(name, kind, shape, rng) for name, shape in layer.items()}
        norm = TensorInfo("norm", (c.d_model,), GGMLQuantizationType.F32, np.ones(c.d_model, np.float32))
        self.tensors: dict[str, TensorInfo] = {}
        for number in range(c.n_layers):
            self.tensors |= {f"blk.{number}.{name}.weight": tensor for name, tensor in shared.items()}
            self.tensors |= {f"blk.{number}.{name}.weight": norm for name in ("attn_norm", "ffn_norm")}
        self.tensors["output_norm.weight"] = norm
        table = random_tensor("token_embd", kind, (c.vocab_size, c.d_model), rng)
        self.tensors |= {"token_embd.weight": table, "output.weight": table}

    def tensor(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ModelFileError(f"{self.path}: no tensor '{name}'; this is a bug")
        return self.tensors[name]
