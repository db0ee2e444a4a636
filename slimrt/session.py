"""A conversation: the tokens read so far, their cache, and how much of it the next prompt can use again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimrt.engine import Engine, Progress, Trace
from slimrt.errors import ContextError, TokenizerError
from slimrt.prune.plan import PrunePlan
from slimrt.prune.schedule import Schedule, schedule


@dataclass(frozen=True)
class Reading:
    """How a prompt was read: tokens that an earlier call had done already and why not more; tokens each cut kept; first
    tokens under windows; why it ran dense although there is a plan."""

    reused: int
    note: str
    stages: tuple[int, ...] = ()
    windowed: int = 0
    dense: str = ""


class Session:
    """The tokens of one conversation and what the model made of them.

    ``logits`` [V] are those after the last token (None while there is none). ``revision`` counts the prompts read, so
    that a generation can tell that somebody else moved the session on.
    """

    def __init__(self, engine: Engine, ctx: int) -> None:
        self.engine, self.ctx = engine, ctx
        self.tokens: list[int] = []
        self.logits: np.ndarray | None = None
        self.context = engine.new_context()
        self.revision = 0

    def prefill(
        self,
        ids: Sequence[int],
        plan: PrunePlan | None = None,
        *,
        progress: Progress | None = None,
        trace: Trace | None = None,
    ) -> Reading:
        """Make the conversation equal ``ids``, computing only what its longest common prefix with them does not cover.

        With a ``plan`` that cuts at this length, the dense layers run for the new tokens only, and the pruned stages
        anew for all, over the blocks that the new last tokens choose: the result is that of a fresh prefill. The last
        token is always computed, for its logits.

        Raises ContextError if ``ids`` is empty or exceeds the context, TokenizerError for ids outside the vocabulary;
        the conversation is then as it was.
        """
        self._check(ids, len(ids))
        self.revision += 1
        rule = schedule(plan, len(ids))
        # The query window is always computed, so that the choice is made by the queries of the new last tokens.
        fresh = rule.plan.query_window if rule.cuts else self.engine.ops.exact_rows
        same = common_prefix(self.tokens, ids)
        same_rows = self.context.windows.same_rows(rule.windows)
        if rule.boundary != self._boundary_layer or not same_rows or (self._pruned and not rule.cuts):
            reused, note = 0, "the last conversation was pruned otherwise" if self.tokens else "nothing read before"
            self.reset()
            self.context.cache.close()  # before the new one allocates what it stages copies in
            self.context = self.engine.new_context(rule.boundary)
        else:
            reused, note = max(0, min(same, len(ids) - fresh)), self._reuse_note(same, len(ids))
            if same_rows < reused:
                reused = int(same_rows)
                note += f"; from token {reused} on it runs again, for what saw everything there is under windows now"
        self.truncate(reused)
        stages = self._read(ids[reused:], rule, progress, trace)
        return Reading(reused, note, stages, rule.windows.rows, rule.why_dense)

    @property
    def _boundary_layer(self) -> int | None:
        boundary = self.context.boundary
        return None if boundary is None else boundary.layer

    @property
    def _pruned(self) -> bool:
        """Whether the last layers lack some of the tokens."""
        return self.context.cache.length(self.engine.config.n_layers - 1) < self.context.length

    def _reuse_note(self, same: int, length: int) -> str:
        if not self.tokens:
            return "nothing read before"
        if same == 0:
            return "the first token differs from the last conversation's"
        if same == length:
            return "the prompt was read before; only its end runs again"
        if same == len(self.tokens):
            return "the prompt continues the last conversation"
        return f"the prompt departs from the last conversation after token {same}"

    def extend(self, ids: Sequence[int], *, progress: Progress | None = None) -> None:
        """Read further tokens through all layers, as decode does. Raises as ``prefill`` does."""
        self._check(ids, len(self.tokens) + len(ids))
        self._read(ids, None, progress)

    def _read(
        self,
        ids: Sequence[int],
        rule: Schedule | None,
        progress: Progress | None,
        trace: Trace | None = None,
    ) -> tuple[int, ...]:
        """Read on by ``rule`` as the end of a prompt, or (None) as decode does."""
        # Until the work is done the tokens are not part of the conversation: an interrupted call leaves the rest valid.
        start = len(self.tokens)
        stages: tuple[int, ...] = ()
        try:
            if rule is not None:
                hidden, stages = self.engine.prefill(self.context, ids, rule, progress=progress, trace=trace)
                self.logits = self.engine.logits(hidden)[0]
            elif len(ids) == 1:
                self.logits = self.engine.decode_one_token(self.context, ids[0])
            else:
                self.logits = self.engine.logits(self.engine.extend(self.context, ids, progress=progress))[0]
        except BaseException:
            # A cut had dropped the pruned stages of the old tokens, so nothing of them can serve again.
            cut = rule is not None and rule.cuts
            self.truncate(0 if cut or not self.context.cache.intact else start)
            raise
        self.tokens.extend(ids)
        return stages

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
        self.context.truncate(length)
        self.logits = None

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)
        self.revision += 1

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held, resident or in host memory."""
        return self.kv_bytes_device + self.kv_bytes_host

    @property
    def kv_bytes_device(self) -> int:
        """Bytes of keys and values that decode reads without fetching them."""
        return self.context.cache.nbytes_device

    @property
    def kv_bytes_host(self) -> int:
        """Bytes of keys and values in host memory, under a budget."""
        return self.context.cache.nbytes_host


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(differs[0]) if len(differs) else length
