"""Texts as vectors, as ``llama_cpp.Llama.embed`` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slimrt.errors import SettingError
from slimrt.llm import LLM

__all__ = ["check_pooling", "embedded", "embedding_response"]

POOLING = {-1: None, 0: None, 1: "mean", 2: "cls", 3: "last"}  # LLAMA_POOLING_TYPE_*; a decoder's own is none


def check_pooling(kind: Any) -> None:
    """Raise SettingError unless ``kind`` is one of llama_cpp's."""
    if kind not in POOLING:
        raise SettingError(f"pooling_type {kind!r}: must be 0 (none), 1 (mean), 2 (the first token) or 3 (the last)")


def embedded(llm: LLM, texts: Sequence[list[int]], pooling: int, normalize: bool) -> list[Any]:
    """A vector for each of ``texts`` (token ids), or with pooling 0 one for each of its tokens: lists of numbers."""
    kind = POOLING[pooling]
    if kind is not None:
        return llm.embed(texts, pooling=kind, normalize=normalize).tolist()  # type: ignore[arg-type]
    found = []
    for ids in texts:
        states = llm.token_states(ids)
        if normalize:
            states /= np.maximum(np.linalg.norm(states, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        found.append(states.tolist())
    return found


def embedding_response(vectors: Sequence[Any], model: str, tokens: int) -> dict[str, Any]:
    """OpenAI's list of embeddings as a dictionary."""
    data = [{"object": "embedding", "embedding": vector, "index": at} for at, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}
