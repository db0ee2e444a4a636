"""slimrt: long prompts answered now, from GGUF models, in Python, without a deep-learning framework."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ChatTemplate",
    "Completion",
    "Grammar",
    "Llama",
    "PrunePlan",
    "SamplingConfig",
    "SlimrtError",
    "Stage",
    "ToolCall",
    "Window",
    "load",
]

if TYPE_CHECKING:
    from slimrt.config import SamplingConfig
    from slimrt.errors import SlimrtError
    from slimrt.llama_cpp.llama import Llama
    from slimrt.llm import LLM
    from slimrt.loading import load
    from slimrt.prune.plan import PrunePlan, Stage, Window
    from slimrt.results import Completion, ToolCall
    from slimrt.structured.grammar import Grammar
    from slimrt.text.chat_template import ChatTemplate

_HOMES = {
    "LLM": "slimrt.llm",
    "ChatTemplate": "slimrt.text.chat_template",
    "Completion": "slimrt.results",
    "Grammar": "slimrt.structured.grammar",
    "Llama": "slimrt.llama_cpp.llama",
    "PrunePlan": "slimrt.prune.plan",
    "SamplingConfig": "slimrt.config",
    "SlimrtError": "slimrt.errors",
    "Stage": "slimrt.prune.plan",
    "ToolCall": "slimrt.results",
    "Window": "slimrt.prune.plan",
    "load": "slimrt.loading",
}


if not TYPE_CHECKING:  # else a type checker would take any name for one of these

    def __getattr__(name: str) -> object:
        # Names are imported on first use: `slimrt --help` must not wait for NumPy, gguf and tokenizers.
        if name in _HOMES:
            from importlib import import_module

            return getattr(import_module(_HOMES[name]), name)
        from slimrt.llama_cpp.missing import refuse

        refuse(name)
        raise AttributeError(f"module 'slimrt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
