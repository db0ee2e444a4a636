"""A small, valid, random LLaMA in a GGUF file: loads end to end, in milliseconds, for tests that need any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, TokenType

MERGES = (
    ("Ġ", "t"), ("h", "e"), ("i", "n"), ("r", "e"), ("o", "n"), ("Ġt", "he"), ("a", "t"), ("e", "r"), ("Ġ", "a"),
    ("Ġ", "Ġ"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("o", "r"), ("l", "d"), ("Ġ", "w"), ("Ġw", "or"),
    ("Ġwor", "ld"),
)  # fmt: skip
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Byte offsets of the half-precision scales in a block of each type (ggml-common.h), so that random blocks are finite.
_SCALES_AT: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,),
    "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip


def byte_tokens() -> list[str]:
    """The 256 one-byte tokens in byte order, as GPT-2 spells them: printable ones as themselves, others moved up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(moved) for byte in range(256)]


def vocabulary(vocab_size: int = 0) -> tuple[list[str], list[int]]:
    """Control tokens (ids 0-2), 256 bytes, merges, then unused tokens up to ``vocab_size``; and their types."""
    tokens = [*CONTROL, *byte_tokens(), *(a + b for a, b in MERGES)]
    types = [int(TokenType.CONTROL)] * len(CONTROL) + [int(TokenType.NORMAL)] * (len(tokens) - len(CONTROL))
    spare = max(0, vocab_size - len(tokens))
    tokens += [f"[unused{n}]" for n in range(spare)]
    types += [int(TokenType.UNUSED)] * spare
    return tokens, types


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Random bytes [rows, bytes per row] that are valid blocks of ``kind``, of deviation 1/sqrt(columns)."""
    block, size = GGML_QUANT_SIZES[kind]
    assert shape[-1] % block == 0, f"{kind.name} rows divide into blocks of {block}"
    blocks = rng.integers(0, 256, (shape[0] * (shape[1] // block), size), np.uint8)
    scale = rng.uniform(0.5, 1, len(blocks))
    _set_scales(kind, blocks, scale)
    deviation = gguf.dequantize(blocks, kind).std() * np.sqrt(shape[-1])
    _set_scales(kind, blocks, scale / deviation)
    return blocks.reshape(shape[0], -1)


def _set_scales(kind: GGMLQuantizationType, blocks: np.ndarray, scale: np.ndarray) -> None:
    half = scale.astype("<f2")
    if kind.name == "IQ1_M":  # its scale lies in the top four bits of four words
        for word, bits in enumerate(half.view(np.uint16)[None] >> np.arange(0, 16, 4, dtype=np.uint16)[:, None]):
            at = 48 + 2 * word + 1
            blocks[:, at] = (blocks[:, at] & 0x0F) | ((bits & 0xF) << 4).astype(np.uint8)
    elif kind.name == "NVFP4":
        blocks[:, :4] = np.clip(np.log2(scale) + 7, 0, 15).astype(np.uint8)[:, None] << 3  # E4M3
    for at in _SCALES_AT.get(kind.name, ()):
        blocks[:, at : at + 2] = half.view(np.uint8).reshape(-1, 2)


def random_tensor(kind: GGMLQuantizationType, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal weights of deviation 1/sqrt(columns) in ``kind``; random blocks where the package only dequantises."""
    values = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
    if kind == GGMLQuantizationType.F64:
        return values.astype(np.float64)
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(kind, (shape[0], shape[-1]), rng)


def write_tiny_llama(
    path: str | Path,
    *,
    arch: str = "llama",
    n_layers: int = 2,
    d_model: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    d_ff: int = 96,
    head_dim: int | None = None,
    vocab_size: int = 0,
    ctx: int = 512,
    type: str = "F32",
    tied: bool = True,
    qkv_bias: bool | None = None,
    k_bias: float = 0.1,
    rope_freqs: bool = False,
    seed: int = 0,
    split_max_tensors: int = 0,
    **metadata: Any,
) -> Path:
    """Write the model to ``path`` and return it (the first part's path if ``split_max_tensors`` cuts it into parts).

    ``type``: name of the matrices' type; vectors are F32. Types with blocks of 256 want ``d_model`` and ``d_ff`` to be
    multiples of 256. ``head_dim`` other than d_model / n_heads is written as key and value length. ``qkv_bias`` None:
    as the architecture has it; ``k_bias``: the deviation of that of the keys. ``metadata``: keys to add or replace
    (``**{"llama.rope.freq_base": 5e5}``), None drops one; int, float, bool, str or list.
    """
    rng = np.random.default_rng(seed)
    width = head_dim or d_model // n_heads
    tokens, types = vocabulary(vocab_size)
    keys: dict[str, Any] = {
        "general.name": "tiny",
        f"{arch}.block_count": n_layers,
        f"{arch}.context_length": ctx,
        f"{arch}.embedding_length": d_model,
        f"{arch}.feed_forward_length": d_ff,
        f"{arch}.attention.head_count": n_heads,
        f"{arch}.attention.head_count_kv": n_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": width,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if width != d_model // n_heads:
        keys |= {f"{arch}.attention.key_length": width, f"{arch}.attention.value_length": width}
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    for key, value in (keys | metadata).items():
        _add(writer, key, value)

    def vector(name: str, size: int, centre: float, deviation: float = 0.1) -> None:
        writer.add_tensor(name, (centre + rng.standard_normal(size) * deviation).astype(np.float32))

    def matrix(name: str, rows: int, columns: int) -> None:
        kind = GGMLQuantizationType[type]
        writer.add_tensor(name, random_tensor(kind, (rows, columns), rng), raw_dtype=_raw(kind))

    matrix("token_embd.weight", len(tokens), d_model)
    for layer in range(n_layers):
        vector(f"blk.{layer}.attn_norm.weight", d_model, 1)
        for part, rows, columns in (
            ("attn_q", n_heads * width, d_model),
            ("attn_k", n_kv_heads * width, d_model),
            ("attn_v", n_kv_heads * width, d_model),
            ("attn_output", d_model, n_heads * width),
            ("ffn_gate", d_ff, d_model),
            ("ffn_up", d_ff, d_model),
            ("ffn_down", d_model, d_ff),
        ):
            matrix(f"blk.{layer}.{part}.weight", rows, columns)
            if part in ("attn_q", "attn_k", "attn_v") and (arch == "qwen2" if qkv_bias is None else qkv_bias):
                vector(f"blk.{layer}.{part}.bias", rows, 0, k_bias if part == "attn_k" else 0.1)
        vector(f"blk.{layer}.ffn_norm.weight", d_model, 1)
    vector("output_norm.weight", d_model, 1)
    if not tied:
        matrix("output.weight", len(tokens), d_model)
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, width // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    parts = [file.name for file in writer.fout or []]
    writer.close()
    return Path(parts[0])


def _raw(kind: GGMLQuantizationType) -> GGMLQuantizationType | None:
    return None if kind.name in ("F32", "F16", "F64") else kind


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        kind = GGUFValueType.UINT64 if value >= 1 << 32 else GGUFValueType.UINT32 if value >= 0 else GGUFValueType.INT32
        writer.add_key_value(key, value, kind)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
