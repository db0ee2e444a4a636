"""Which tokens of a prompt ask, and what they want: the score ``asked``.

The published scores average over the last 16 queries, so whatever stands last chooses: an instruction behind the
question, or the chat template's own tail. Here a single query that knows what it wants is enough:

- the queries of the last tokens count, and those of the first ones, read as if they stood behind the document (their
  rotation is moved to the end of the prompt, and the mask is left out: a score need not be causal);
- of a query's attention counts how it is shared among the blocks in question, not how much of it goes elsewhere (the
  attention sink, the near past); what all these queries give a block alike is taken off;
- a block is wanted as much as the one query, in the one head, that wants it most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["ASKED", "HEAD", "TAIL", "Asked", "asked_by_place", "wanted"]

ASKED = "asked"  # the score's name in a plan
TAIL = 256  # the last tokens of a prompt, whose queries count: a question, and instructions behind it
HEAD = 256  # the first ones: a system message, or a question before its document
_LEAST = 0.003  # of a query's attention: what falls to the blocks in question must be more than noise


@dataclass(frozen=True)
class Asked:
    """How much the first tokens (``head``) and the last ones (``tail``) of a prompt count as asking, each 0 to 1.

    ``before``: a question stands before the document, so that the last tokens may not know it in early layers.
    """

    head: tuple[float, ...] = ()
    tail: tuple[float, ...] = ()
    before: bool = False

    def asking_blocks(self, block: int) -> tuple[int, ...]:
        """The blocks of ``block`` tokens at the prompt's beginning that hold a token which surely asks."""
        return tuple(sorted({at // block for at, weight in enumerate(self.head) if weight == 1}))


def asked_by_place(tokens: int) -> Asked:
    """Of a prompt of which nothing but its length is known: the last tokens ask."""
    return Asked(tail=(1.0,) * min(TAIL, tokens))


def wanted(groups: Iterable[tuple[np.ndarray, Sequence[float]]], rivals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much blocks are wanted [B] float32, from 0 to 1, and by which query: an index over all groups' [B], or -1.

    ``groups``: attention of some queries in each head that falls to each block [W, H, B], and what each query counts
    [W]. ``rivals`` [B] bool: the blocks in question; the others get 0.
    """
    best = np.zeros(len(rivals), np.float32)
    by = np.full(len(rivals), -1)
    first = 0
    for mass, weights in groups:
        share = mass * rivals
        share /= share.sum(axis=2, keepdims=True) + np.float32(_LEAST)
        share -= share.mean(axis=0)
        most = share.max(axis=1) * np.asarray(weights, np.float32)[:, None]
        query = most.argmax(axis=0)
        value = most[query, np.arange(len(rivals))]
        better = value > best
        best[better], by[better] = value[better], first + query[better]
        first += len(mass)
    return best, by
