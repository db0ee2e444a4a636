"""``Llama``: what code written for ``llama_cpp.Llama`` calls, under the names that such code imports."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Llama", "LlamaGrammar", "LlamaState", "LlamaTokenizer", "LogitsProcessorList", "StoppingCriteriaList"]

if TYPE_CHECKING:
    from slimrt.llama_cpp.grammar import LlamaGrammar
    from slimrt.llama_cpp.llama import Llama, LlamaState, LlamaTokenizer, LogitsProcessorList, StoppingCriteriaList
else:

    def __getattr__(name: str) -> object:
        # On first use: the package is entered for the names that are missing too, which need no NumPy.
        if name == "LlamaGrammar":
            from slimrt.llama_cpp.grammar import LlamaGrammar

            return LlamaGrammar
        if name in __all__:
            from slimrt.llama_cpp import llama

            return getattr(llama, name)
        from slimrt.llama_cpp.missing import refuse

        refuse(name)
        raise AttributeError(f"module 'slimrt.llama_cpp' has no attribute '{name}'")
