"""What ``slimrt.Llama`` keeps of a context: the logits after every token where asked for, and saved states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slimrt.context import Context, Kept
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.memory.plan import available_memory
from slimrt.prune.schedule import Schedule

__all__ = ["AllLogits", "LlamaState"]

_LOGIT_ROWS = 256  # rows of [V] logits computed at a time where all are kept


class AllLogits(Engine):
    """An engine that keeps the logits after every token it reads: ``scores`` [ctx, V] float32."""

    def __init__(self, engine: Engine, ctx: int) -> None:
        super().__init__(engine.model, engine.ops)
        size, free = ctx * self.config.vocab_size * 4, available_memory()
        if free is not None and size > free:
            raise SettingError(
                f"logits_all=True: logits of {ctx} tokens take {size / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free; lower n_ctx or leave it out"
            )
        self.scores = np.zeros((ctx, self.config.vocab_size), np.float32)

    def _through_layers(
        self, context: Context, ids: Sequence[int] | np.ndarray, schedule: Schedule, *, wanted: int, **options: Any
    ) -> tuple[np.ndarray, tuple[Kept, ...]]:
        start = context.length
        hidden, kept = super()._through_layers(context, ids, schedule, wanted=len(ids), **options)
        for at in range(0, len(ids), _LOGIT_ROWS):
            rows = self.logits(hidden[at : at + _LOGIT_ROWS])
            self.scores[start + at : start + at + len(rows)] = rows
        return hidden[len(ids) - wanted :], kept

    def decode(self, context: Context, tokens: Sequence[int], *, alike: bool = True) -> np.ndarray:
        logits = super().decode(context, tokens, alike=alike)
        self.scores[context.length - len(tokens) : context.length] = logits
        return logits


class LlamaState:
    """What ``save_state`` keeps: the tokens, the model's memory of them, and the logits after the last."""

    def __init__(
        self, input_ids: np.ndarray, scores: np.ndarray, n_tokens: int, llama_state: Context, llama_state_size: int,
        logits: np.ndarray | None, model: str,
    ) -> None:  # fmt: skip
        self.model = model  # its fingerprint
        self.input_ids, self.scores, self.n_tokens = input_ids, scores, n_tokens
        self.llama_state, self.llama_state_size, self.logits = llama_state, llama_state_size, logits
