"""What a model says of a text that is there already: logits and log-probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from slimrt.config import context_advice
from slimrt.engine import Engine
from slimrt.errors import ContextError, SettingError
from slimrt.prune.asked import Asked
from slimrt.prune.plan import PrunePlan
from slimrt.session import Session

__all__ = ["continuation_logits", "token_logprobs"]

_LOGIT_ROWS = 256  # rows of [V] logits held at a time


def continuation_logits(
    engine: Engine,
    ctx: int,
    ids: list[int],
    start: int,
    plan: PrunePlan | None,
    *,
    asking: Callable[[Sequence[int]], Asked] | None = None,
    decode: bool = False,
) -> Iterator[np.ndarray]:
    """Logits [rows, V] that predict ids[start:], a bounded number of rows at a time, ids[:start] read as a prompt under
    ``plan`` (``asking``: see Session) in a context of its own; ``decode``: the rest a token at a time, as in decode.

    Raises SettingError unless 1 <= start <= len(ids), ContextError if there are more than ``ctx`` ids.
    """
    if not 1 <= start <= len(ids):
        raise SettingError(f"start {start}: must lie in 1..{len(ids)}, the first token has nothing before it")
    if len(ids) > ctx:
        raise ContextError(
            f"{len(ids)} tokens, the context holds {ctx}; {context_advice(len(ids), engine.config.ctx_train)}"
        )
    if start == len(ids):
        return
    session = Session(engine, ctx, asking)
    session.prefill(ids[:start], plan)
    assert session.logits is not None
    yield session.logits[None]
    rest = ids[start:-1]
    if decode or engine.budgeted:  # the budget holds in decode only, a token at a time
        for token in rest:
            yield engine.decode_one_token(session.context, token)[None]
    elif rest:
        hidden = engine.extend(session.context, rest, wanted=len(rest))
        for lo in range(0, len(hidden), _LOGIT_ROWS):
            yield engine.logits(hidden[lo : lo + _LOGIT_ROWS])


def token_logprobs(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """logits [T, V], tokens [T] -> log-softmax at the tokens [T] float32."""
    peak = logits.max(axis=1)
    total = np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64)
    return (logits[np.arange(len(tokens)), list(tokens)] - peak - np.log(total)).astype(np.float32)
