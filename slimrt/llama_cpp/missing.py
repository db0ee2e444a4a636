"""What ``llama_cpp`` offers and slimrt does not, each with a reason: an import or a call then says so in one line."""

from __future__ import annotations

__all__ = ["METHODS", "NAMES", "refuse"]

_C_API = "there is no C interface beneath; use the methods of slimrt.Llama, or slimrt.load"

NAMES = {
    "LlamaHFTokenizer": "tokens come from the model file; leave it out",
    "Jinja2ChatFormatter": "give the template itself as chat_format",
    "llama_chat_format": "chats go through Jinja templates; give chat_format or chat_template",
    "llama_grammar": "LlamaGrammar lies in slimrt.llama_cpp itself; import it from there",
}
"""Names that programs import from ``llama_cpp``."""

METHODS = {
    "ctx": _C_API,
    "model": _C_API,
    "batch": _C_API,
    "context_params": "slimrt has no llama.cpp parameters; n_ctx() and the constructor's arguments say the same",
    "model_params": "slimrt has no llama.cpp parameters; the constructor's arguments say the same",
    "chat_handler": "chats go through Jinja templates; give chat_format",
}
"""Methods and attributes of ``llama_cpp.Llama``."""


def refuse(name: str) -> None:
    """Raises ImportError with the reason for a name of ``llama_cpp`` that has no counterpart here."""
    if name in NAMES:
        raise ImportError(f"{name}: slimrt has none: {NAMES[name]}")
