"""Models worth using besides the small default, in files that slimrt runs from as they are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SUGGESTED", "SuggestedModel"]


@dataclass(frozen=True)
class SuggestedModel:
    """``name`` fetches it. ``size``: bytes of the file. ``memory``: bytes in all at a context of 8k on compiled
    kernels, by ``slimrt inspect``. ``context``: tokens it was trained on. ``use``: what it is good for.
    """

    title: str
    name: str
    size: int
    memory: int
    context: int
    use: str


SUGGESTED = (
    SuggestedModel(
        "Qwen2.5 1.5B",
        "hf:Qwen/Qwen2.5-1.5B-Instruct-GGUF/qwen2.5-1.5b-instruct-q4_k_m.gguf",
        1_117_320_736,
        1_870_000_000,
        32768,
        "any laptop",
    ),
    SuggestedModel(
        "Llama 3.2 3B",
        "hf:bartowski/Llama-3.2-3B-Instruct-GGUF/Llama-3.2-3B-Instruct-Q4_K_M.gguf",
        2_019_377_600,
        3_990_000_000,
        131072,
        "long documents",
    ),
    SuggestedModel(
        "Qwen2.5 7B",
        "hf:bartowski/Qwen2.5-7B-Instruct-GGUF/Qwen2.5-7B-Instruct-Q4_K_M.gguf",
        4_683_073_952,
        6_830_000_000,
        32768,
        "good answers, many languages",
    ),
    SuggestedModel(
        "Llama 3.1 8B",
        "hf:bartowski/Meta-Llama-3.1-8B-Instruct-GGUF/Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf",
        4_920_734_272,
        7_700_000_000,
        131072,
        "good answers, long documents",
    ),
)
