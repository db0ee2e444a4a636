"""What ``slimrt.Llama`` keeps and returns to: saved states, caches of them, and how it was loaded."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from slimrt.errors import ContextError, SettingError
from slimrt.llama_cpp.context import LlamaContext
from slimrt.llama_cpp.llama_cache import LlamaDiskCache
from slimrt.llama_cpp.state import LlamaState
from slimrt.reuse import common_prefix
from slimrt.session import Session
from slimrt.session_file import model_fingerprint

__all__ = ["LlamaStates"]


class LlamaStates(LlamaContext):
    """A context that can be saved and returned to."""

    cache: Any = None

    def set_cache(self, cache: Any) -> None:
        """Look for prompts in ``cache`` (a LlamaRAMCache, a LlamaDiskCache, None, or anything that maps tokens to
        states), and keep there what each completion has read. The last prompt's beginning is used without one too."""
        self.cache = cache

    def save_state(self) -> LlamaState:
        """A copy of the context, to be given to ``load_state`` of the same model."""
        session = self._current
        with session.lock:
            scores = np.empty((0, self.n_vocab()), np.float32) if self._all_logits is None else self._scores.copy()
            return self._state_of(session.fork(), scores)

    def _state_of(self, session: Session, scores: np.ndarray) -> LlamaState:
        """What ``session`` holds, which is used for nothing else."""
        tokens = np.zeros(self._ctx, np.intc)
        tokens[: len(session.tokens)] = session.tokens
        count, size = len(session.tokens), session.kv_bytes
        return LlamaState(tokens, scores, count, session.context, size, session.logits, self._fingerprint)

    def load_state(self, state: LlamaState) -> None:
        """Return to a saved context. Raises ContextError if it does not fit into this one's, SettingError for another
        model's."""
        self._check_state(state)
        context = copy.deepcopy(state.llama_state)
        self._current.replace(context, state.input_ids[: state.n_tokens].tolist(), state.logits)
        if self._all_logits is not None:
            self._all_logits.scores[: len(state.scores)] = state.scores

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, LlamaState):
            raise SettingError(f"state of type {type(state).__name__}: must be one that save_state returned")
        if state.model != self._fingerprint:
            raise SettingError("the state is another model's; save one with this model")
        if state.n_tokens > self._ctx:
            raise ContextError(
                f"the state holds {state.n_tokens} tokens, the context {self._ctx}; load with a larger n_ctx"
            )

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(self._model.file, self._model.engine.adapters)

    def _fresh_session(self) -> Session:
        return Session(self._current.engine, self._ctx, self._model.asking)

    def _recall(self, ids: Sequence[int]) -> None:
        """Become what the cache has of the prompt ``ids``, where that is more than the context holds."""
        if self.cache is None:
            return
        with self._cache_at_hand():
            try:
                state = self.cache[tuple(ids)]
            except KeyError:
                return
            held = state.input_ids[: state.n_tokens].tolist()
            own = self._current.tokens
            fits = isinstance(state, LlamaState) and state.model == self._fingerprint and state.n_tokens <= self._ctx
            if fits and common_prefix(held, ids) > common_prefix(own, ids):
                self.load_state(state)

    def _remember(self) -> None:
        """Keep the context in the cache."""
        if self.cache is not None and self._current.tokens:
            with self._cache_at_hand():
                self.cache[tuple(self._current.tokens)] = self.save_state()

    def _cache_at_hand(self) -> Any:
        return self.cache.used_by(self) if isinstance(self.cache, LlamaDiskCache) else contextlib.nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        """How the model was loaded; an unpickled copy loads it again, with an empty context."""
        return self._arguments

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state)
