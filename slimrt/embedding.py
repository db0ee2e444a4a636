"""Texts as vectors: hidden states behind the output norm, pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from slimrt.engine import Engine
from slimrt.errors import SettingError

__all__ = ["Pooling", "check_pooling", "embedded", "states_of"]

Pooling = Literal["mean", "last", "cls"]


def check_pooling(pooling: object) -> None:
    """Raise SettingError unless ``pooling`` is one of the three."""
    if pooling not in get_args(Pooling):
        raise SettingError(f"pooling {pooling!r}: must be 'mean', 'last' or 'cls' (the first token)")


def embedded(engine: Engine, prompts: Sequence[Sequence[int]], pooling: Pooling, *, normalize: bool) -> np.ndarray:
    """Token ids -> one vector each [n, D] float32; see ``LLM.embed``."""
    vectors = np.empty((len(prompts), engine.config.d_model), np.float32)
    context = engine.new_context()
    try:
        for vector, ids in zip(vectors, prompts, strict=True):
            states, _ = engine.prefill(context, ids, wanted=1 if pooling == "last" else len(ids))
            states = states[:1] if pooling == "cls" else states
            vector[:] = engine.last_states(states).mean(axis=0, dtype=np.float64)
            context.truncate(0)
    finally:
        context.cache.close()
    if normalize:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return vectors


def states_of(engine: Engine, ids: Sequence[int]) -> np.ndarray:
    """The hidden states behind the output norm of each of ``ids``, from an empty context -> float32 [T, D]."""
    context = engine.new_context()
    try:
        return engine.last_states(engine.prefill(context, ids, wanted=len(ids))[0])
    finally:
        context.cache.close()
