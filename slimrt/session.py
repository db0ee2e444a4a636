"""A conversation: the tokens read so far, their cache, and how much of it the next prompt can use again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimrt.engine import Engine, Progress
from slimrt.errors import ContextError, TokenizerError


@dataclass(frozen=True)
class Reuse:
    """How many tokens of a prompt an earlier call had read already, and why not more."""

    tokens: int
    note: str


class Session:
    """The tokens of one conversation and what the model made of them.

    ``logits`` [V] are those after the last token (None while there is none). ``revision`` counts the prompts read, so
    that a generation can tell that somebody else moved the session on.
    """

    def __init__(self, engine: Engine, ctx: int) -> None:
        self.engine, self.ctx = engine, ctx
        self.tokens: list[int] = []
        self.logits: np.ndarray | None = None
        self.cache = engine.new_cache()
        self.revision = 0

    def prefill(self, ids: Sequence[int], *, progress: Progress | None = None) -> Reuse:
        """Make the conversation equal ``ids``, computing only what its longest common prefix with them does not cover.

        The last token is always computed, for its logits. Raises ContextError if ``ids`` is empty or exceeds the
        context, TokenizerError for ids outside the vocabulary; the conversation is then as it was.
        """
        self._check(ids, len(ids))
        self.revision += 1
        same = _common_prefix(self.tokens, ids)
        reuse = self._reuse(same, len(ids))
        self.truncate(reuse.tokens)
        self.extend(ids[reuse.tokens :], progress=progress)
        return reuse

    def _reuse(self, same: int, length: int) -> Reuse:
        if not self.tokens:
            return Reuse(0, "nothing read before")
        if same == 0:
            return Reuse(0, "the first token differs from the last conversation's")
        if same == len(self.tokens) and same < length:
            return Reuse(same, "the prompt continues the last conversation")
        if same == length:
            return Reuse(length - 1, "the prompt was read before; its last token runs again for its logits")
        return Reuse(same, f"the prompt departs from the last conversation after token {same}")

    def extend(self, ids: Sequence[int], *, progress: Progress | None = None) -> None:
        """Read further tokens. Raises as ``prefill`` does."""
        self._check(ids, len(self.tokens) + len(ids))
        start = len(self.tokens)
        # Until the work is done the tokens are not part of the conversation: an interrupted call leaves it as it was.
        try:
            hidden = self.engine.prefill(self.cache, ids, start, progress=progress)
            self.logits = self.engine.logits(hidden)[0]
        except BaseException:
            self.truncate(start)
            raise
        self.tokens.extend(ids)

    def _check(self, ids: Sequence[int], length: int) -> None:
        if not len(ids):
            raise ContextError("the prompt has no tokens; at least one is needed; give some text")
        if length > self.ctx:
            raise ContextError(
                f"the prompt brings the conversation to {length} tokens, the context holds {self.ctx}; "
                f"shorten it, or load the model with ctx={length} or more (--ctx)"
            )
        vocab = self.engine.config.vocab_size
        for token in ids:
            if not 0 <= token < vocab:
                raise TokenizerError(f"token id {token}: ids lie in 0..{vocab - 1}; use this model's tokenizer")

    def truncate(self, length: int) -> None:
        """Forget all tokens from index ``length`` on."""
        del self.tokens[length:]
        self.cache.truncate(length)
        self.logits = None

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)
        self.revision += 1


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(differs[0]) if len(differs) else length
