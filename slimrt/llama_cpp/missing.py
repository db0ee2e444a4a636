"""What ``llama_cpp`` offers and slimrt does not, each with a reason: an import or a call then says so in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

__all__ = ["METHODS", "MODULES", "NAMES", "refuse", "refuse_modules"]

_C_API = "there is no C interface beneath; use the methods of slimrt.Llama, or slimrt.load"
_PICTURES = "models read text only"

MODULES = {
    "llama_chat_format": "chats go through Jinja templates; give chat_format or chat_template",
    "llama_cpp": _C_API,
    "llama_types": "messages and answers are plain dicts in the same form; annotate them as dict[str, Any]",
    "llava_cpp": _PICTURES,
    "mtmd_cpp": _PICTURES,
    "server": "the command 'slimrt serve' is the server",
}
"""Modules of ``llama_cpp``."""

NAMES = {
    "Jinja2ChatFormatter": "give the template itself as chat_format",
    "LlamaHFTokenizer": "tokens come from the model file; leave it out",
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
    reason = (MODULES | NAMES).get(name)
    if reason is None and name.startswith(("llama_", "ggml_")):
        reason = _C_API
    if reason is None and name.endswith("ChatHandler"):
        reason = f"{_PICTURES}, and chats go through Jinja templates; give chat_format"
    if reason is not None:
        raise ImportError(f"{name}: slimrt has none: {reason}")


class _Refusals(MetaPathFinder):
    """Looks after the finders that find modules; what is in ``MODULES`` is refused with its reason."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        package, _, name = fullname.rpartition(".")
        if package == __package__ and name in MODULES:
            refuse(name)


def refuse_modules() -> None:
    """From now on an import of a module that ``llama_cpp`` has and slimrt has not says why."""
    if not any(isinstance(finder, _Refusals) for finder in sys.meta_path):
        sys.meta_path.append(_Refusals())
