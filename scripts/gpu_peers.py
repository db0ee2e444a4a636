"""What slimrt is measured against on a GPU, where it is installed: torch's attention, Transformers."""

from __future__ import annotations

import importlib.util
import statistics
import time
from typing import Any

from slimrt.bench.synthetic import SHAPES

__all__ = ["attention", "prefill"]


def attention(shape: str, lengths: tuple[int, ...], repeats: int = 5) -> list[dict[str, Any]]:
    """Causal grouped-query attention in float16 at the sizes of ``shape``: seconds by torch backend."""
    missing = _missing("torch")
    if missing:
        return [{"skipped": missing}]
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    c, rows = SHAPES[shape], []
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for length in lengths:
        q, k, v = (
            torch.randn(1, heads, length, c.head_dim, dtype=torch.float16, device="cuda")
            for heads in (c.n_heads, c.n_kv_heads, c.n_kv_heads)
        )
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            row: dict[str, Any] = {"backend": f"torch {torch.__version__} {name.lower()}", "length": length}
            try:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    times = []
                    for _ in range(repeats + 1):
                        flush.zero_()
                        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        begun.record()
                        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                        ended.record()
                        torch.cuda.synchronize()
                        times.append(begun.elapsed_time(ended) / 1e3)
                row["seconds"] = statistics.median(times[1:])
                row["tflop_s"] = 2 * length * (length + 1) * c.n_heads * c.head_dim / row["seconds"] / 1e12
            except Exception as error:
                row["error"] = str(error).splitlines()[0]
            rows.append(row)
    return rows


_models: dict[str, Any] = {}


def prefill(shape: str, length: int, repeats: int = 2) -> dict[str, Any]:
    """Seconds to the first token of a random float16 model of ``shape`` in Transformers with SDPA."""
    missing = _missing("torch", "transformers")
    if missing:
        return {"skipped": missing}
    import torch
    import transformers

    if shape not in _models:
        c = SHAPES[shape]
        config = transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
            max_position_embeddings=c.ctx_train, rope_theta=c.rope.base, tie_word_embeddings=False,
        )  # fmt: skip
        torch.set_default_dtype(torch.float16)
        with torch.device("cuda"):
            _models[shape] = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    times = []
    try:
        for _ in range(repeats if length <= 65536 else 1):
            ids = torch.randint(0, SHAPES[shape].vocab_size, (1, length), device="cuda")
            torch.cuda.synchronize()
            begun = time.perf_counter()
            with torch.inference_mode():
                int(_models[shape](ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
            times.append(time.perf_counter() - begun)
    except Exception as error:
        torch.cuda.empty_cache()
        return {"error": str(error).splitlines()[0]}
    return {
        "ttft_s": min(times),
        "program": f"transformers {transformers.__version__}, torch {torch.__version__}, sdpa",
    }


def _missing(*packages: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None
