"""What slimrt is measured against on a GPU, where it is installed: torch's attention, Transformers."""

from __future__ import annotations

import importlib.util
import statistics
import time
from typing import Any

from slimrt.bench.synthetic import SHAPES

__all__ = ["Peer", "attention"]


def attention(shape: str, length: int, repeats: int = 5) -> list[dict[str, Any]]:
    """Causal grouped-query attention in float16 at the sizes of ``shape``: seconds by torch backend."""
    missing = _missing("torch")
    if missing:
        return [{"skipped": missing}]
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    c, rows = SHAPES[shape], []
    if not torch.cuda.is_available():
        return [{"skipped": "torch finds no GPU"}]
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    q, k, v = (
        torch.randn(1, heads, length, c.head_dim, dtype=torch.float16, device="cuda")
        for heads in (c.n_heads, c.n_kv_heads, c.n_kv_heads)
    )
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
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
            row["unsupported"] = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(row)
    return rows


class Peer:
    """A random float16 model of ``shape`` in Transformers with SDPA; ``missing``: what is not installed, else None."""

    def __init__(self, shape: str) -> None:
        self.missing = _missing("torch", "transformers")
        if self.missing:
            return
        import torch
        import transformers

        c = SHAPES[shape]
        self.vocab = c.vocab_size
        config = transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
            max_position_embeddings=c.ctx_train, rope_theta=c.rope.base, tie_word_embeddings=False,
        )  # fmt: skip
        torch.set_default_dtype(torch.float16)
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        self._model = model.eval()
        self.program = f"transformers {transformers.__version__}, torch {torch.__version__}, sdpa"
        self.prefill(1024, 1)

    def _ids(self, length: int) -> Any:
        import torch

        return torch.randint(0, self.vocab, (1, length), device="cuda")

    def prefill(self, length: int, repeats: int = 3) -> dict[str, Any]:
        """Seconds to the first token, the median of ``repeats``."""
        import torch

        times = []
        for _ in range(repeats):
            ids = self._ids(length)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            with torch.inference_mode():
                int(self._model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
            times.append(time.perf_counter() - begun)
        return {"ttft_s": statistics.median(times), "runs": times, "program": self.program}

    def decode(self, length: int, tokens: int) -> dict[str, Any]:
        """Tokens a second behind ``length`` others, eager, the first two not counted."""
        import torch

        with torch.inference_mode():
            made = self._model(self._ids(length), use_cache=True, logits_to_keep=1)
            token, cache = made.logits[:, -1:].argmax(-1), made.past_key_values
            begun = 0.0
            for number in range(tokens + 2):
                if number == 2:
                    torch.cuda.synchronize()
                    begun = time.perf_counter()
                made = self._model(token, past_key_values=cache, use_cache=True)
                token = made.logits[:, -1:].argmax(-1)
                int(token)  # a program that streams has to know it
            return {"decode_tok_s": tokens / (time.perf_counter() - begun), "program": self.program}


def _missing(*packages: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None
