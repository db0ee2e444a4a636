"""``slimrt.load``."""

from __future__ import annotations

from pathlib import Path

from slimrt.config import Overflow
from slimrt.context import Progress
from slimrt.llm import LLM
from slimrt.load_options import Adapters, Draft, LoadOptions, Plan
from slimrt.weights.gguf import GGUFFile

__all__ = ["load"]


def load(
    path: str | Path | None = None,
    *,
    ctx: int | None = None,
    device: str = "auto",
    prune: Plan = "auto",
    kv_budget: int | None = None,
    threads: int | None = None,
    rope_base: float | None = None,
    rope_scaling: str | None = None,
    rope_factor: float | None = None,
    chat_template: str | None = None,
    overflow: Overflow = "error",
    stream_weights: bool = False,
    cache: bool | str | Path = False,
    draft: Draft = "auto",
    lora: Adapters = (),
    progress: Progress | None = None,
) -> LLM:
    """Open a GGUF model.

    ``path``: a file, "hf:owner/repo/file.gguf", or None for the default model, fetched where needed. ``ctx``: the most
    tokens of a conversation (default: the trained context, at most 8192); past the trained context RoPE is stretched
    by YaRN unless ``rope_scaling`` says "none" or "linear". ``device``: "auto" (a GPU where one works, else the CPU),
    "cuda", "cpu" (compiled kernels where Numba is installed and the processor allows), "numpy" (the slower reference).
    ``kv_budget``: rows of each layer's KV cache that stay resident and that decode reads (default: all); the rest lies
    in host memory.
    ``threads``: cores to use (default: all that the process may). ``chat_template``: a Jinja template or the name of a
    built-in one, in place of the file's. ``overflow``: when the context is full, "error" ends the text or refuses the
    prompt, "shift" drops the oldest turns or text and says so in the timings. ``stream_weights``: keep the layers'
    weights in host memory and bring each to the GPU one layer ahead, for models that exceed it; decoding is slow then.
    ``cache``: keep what is read of long prompts on disk (True: in the user's cache folder, or a folder), so that a
    later process need not read it again; not under a ``kv_budget``.
    ``draft``: how next tokens are guessed, so that several are read at once; the text is the same. "auto": by what
    stood behind the same words before, where that costs nothing (compiled kernels); "lookup": wherever it works; a
    path (or LLM): by a smaller model of the same vocabulary; "off" or None: not at all.
    ``lora``: adapters to apply: GGUF files, or (file, scale); ``LLM.set_adapters`` changes them later. On the CPU.
    ``progress`` is called with (layers loaded, layers).

    Raises ModelFileError for an unusable file, SettingError for options out of range.
    """
    from slimrt.hub.store import resolve

    options = LoadOptions(
        ctx, device, prune, kv_budget, threads, rope_base, rope_scaling, rope_factor, chat_template, overflow,
        stream_weights, cache, draft, lora,
    )  # fmt: skip
    return LLM(GGUFFile(resolve(path)), options, progress=progress)
