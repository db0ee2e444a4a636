"""What a model says of a prompt's own tokens: for completions that ask for ``echo`` and ``logprobs``."""

from __future__ import annotations

from collections.abc import Sequence

from slimrt.errors import SlimrtError
from slimrt.llm import LLM
from slimrt.results import TokenLogprob
from slimrt.sampler import top_logprobs
from slimrt.server.errors import ApiError

__all__ = ["Scored", "prompt_logprobs"]

Scored = list[tuple[int, TokenLogprob | None]]


def prompt_logprobs(llm: LLM, ids: Sequence[int], most: int) -> Scored:
    """Each of ``ids`` with its log-probability behind those before it, of the whole text (no plan), and the ``most``
    likeliest tokens there; the first one has none. Raises ApiError for what cannot be read."""
    scored: Scored = [(ids[0], None)] if ids else []
    try:
        for block in llm.continuation_blocks(ids, 1, prune="off"):
            for logits in block:
                token = ids[len(scored)]
                scored.append((token, top_logprobs(logits, token, most)))
    except SlimrtError as error:
        raise ApiError(400, f"'prompt': {error}", param="prompt") from None
    return scored
