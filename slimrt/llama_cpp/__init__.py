"""``Llama``: what code written for ``llama_cpp.Llama`` calls, under the names that such code imports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimrt.llama_cpp.missing import refuse, refuse_modules

__all__ = [
    "BaseLlamaCache",
    "Llama",
    "LlamaCache",
    "LlamaDiskCache",
    "LlamaGrammar",
    "LlamaPromptLookupDecoding",
    "LlamaRAMCache",
    "LlamaState",
    "LlamaTokenizer",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "StoppingCriteriaList",
]

# llama.h's numbers, which programs pass to the constructor.
LLAMA_POOLING_TYPE_UNSPECIFIED, LLAMA_POOLING_TYPE_NONE, LLAMA_POOLING_TYPE_MEAN = -1, 0, 1
LLAMA_POOLING_TYPE_CLS, LLAMA_POOLING_TYPE_LAST = 2, 3
LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED, LLAMA_ROPE_SCALING_TYPE_NONE = -1, 0
LLAMA_ROPE_SCALING_TYPE_LINEAR, LLAMA_ROPE_SCALING_TYPE_YARN = 1, 2
LLAMA_SPLIT_MODE_NONE, LLAMA_SPLIT_MODE_LAYER, LLAMA_SPLIT_MODE_ROW = 0, 1, 2
LLAMA_DEFAULT_SEED = 0xFFFFFFFF
GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 = 0, 1, 2, 8

if TYPE_CHECKING:
    from slimrt.llama_cpp.llama import (
        Llama,
        LlamaState,
        LlamaTokenizer,
        LogitsProcessorList,
        MinTokensLogitsProcessor,
        StoppingCriteriaList,
    )
    from slimrt.llama_cpp.llama_cache import BaseLlamaCache, LlamaCache, LlamaDiskCache, LlamaRAMCache
    from slimrt.llama_cpp.llama_grammar import LlamaGrammar
    from slimrt.llama_cpp.llama_speculative import LlamaPromptLookupDecoding
else:

    def __getattr__(name: str) -> object:
        # On first use: the package is entered for names that are missing too, which need no NumPy.
        from importlib import import_module

        if name in __all__:
            homes = {"LlamaGrammar": "llama_grammar", "LlamaPromptLookupDecoding": "llama_speculative"}
            home = "llama_cache" if name.endswith("Cache") else homes.get(name, "llama")
            return getattr(import_module(f"slimrt.llama_cpp.{home}"), name)
        refuse(name)
        raise AttributeError(f"module 'slimrt.llama_cpp' has no attribute '{name}'")


refuse_modules()
