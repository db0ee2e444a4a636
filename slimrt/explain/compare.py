"""The same prompt without cuts: what the dense run's answer looked at, and what it is worth to the pruned one.

The dense run writes the first tokens of its answer. Read again behind its prompt in one piece, their queries tell by
layer how their attention falls to the prompt's blocks. What falls to a block in layers where the plan had dropped it is
what pruning took away; read behind the pruned prompt, the same tokens tell what that did to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimrt.context import Progress
from slimrt.eval.metrics import kl, nll
from slimrt.explain.trace import CutTrace, PrefillTrace
from slimrt.llm import LLM
from slimrt.ops.protocol import Ops
from slimrt.session import Session

__all__ = ["ANSWER", "Comparison", "compare"]

ANSWER = 16  # tokens of the dense run's answer


@dataclass(frozen=True)
class Comparison:
    """What a dense run of the prompt shows beside the plan's.

    ``answer``: the text of the dense run's first ``tokens`` tokens. ``nats_dense``, ``nats_plan``: -log p of all of
    them after the dense and the pruned prompt. ``kl``: KL(dense || plan) of the next token, in nats. ``attended`` [B]:
    how the attention of these tokens falls to the prompt's blocks, the mean over heads and the layers behind the first
    cut; ``missed`` [B]: the part of it in layers where the block had been dropped.
    """

    answer: str
    tokens: int
    nats_dense: float
    nats_plan: float
    kl: float
    attended: tuple[float, ...]
    missed: tuple[float, ...]

    @property
    def most_missed(self) -> tuple[int, ...]:
        """The numbers of the blocks that were missed most, five at the most, the first of them most."""
        order = sorted(range(len(self.missed)), key=lambda number: -self.missed[number])
        return tuple(number for number in order[:5] if self.missed[number] > 0)


class _Watcher(PrefillTrace):
    """Sums the attention of a few last rows by block, layer by layer."""

    def __init__(self, ops: Ops, block: int, blocks: int) -> None:
        super().__init__()
        self.by_layer: dict[int, np.ndarray] = {}
        self._ops, self._block, self._blocks = ops, block, blocks

    def attention(self, layer: int, q: Any, keys: Any) -> None:
        """The mean over rows and heads [B]."""
        mass = self._ops.block_mass(q, keys, self._block, True)
        self.by_layer[layer] = mass.mean(axis=(0, 1), dtype=np.float64)[: self._blocks]


def compare(
    llm: LLM,
    pruned: Session,
    ids: Sequence[int],
    cuts: Sequence[CutTrace],
    block: int,
    progress: Progress | None = None,
) -> Comparison:
    """Read ``ids`` once more, without cuts and windows, beside ``pruned``, which has read them under the plan.

    ``cuts``: those of the plan's run, in blocks of ``block`` tokens. ``pruned`` has read the answer too when this
    returns. Raises ContextError where the context has no room for ``ids`` and ``ANSWER`` tokens.
    """
    dense = llm.session()
    dense.check(ids, ANSWER)
    dense.prefill(ids, None, progress=progress)
    logits, answer = [dense.logits], []
    for _ in range(ANSWER):
        assert dense.logits is not None
        answer.append(int(dense.logits.argmax()))
        if answer[-1] in llm.tokenizer.stop_ids:
            break
        dense.extend(answer[-1:])
        logits.append(dense.logits)
    blocks = -(-len(ids) // block)
    watcher = _Watcher(llm.engine.ops, block, blocks)
    dense.truncate(len(ids))
    llm.engine.prefill(dense.context, answer, trace=watcher)
    dense.reset()  # it read past the session's back
    first = cuts[0].layer + 1 if cuts else 0
    attended, missed = np.zeros(blocks), np.zeros(blocks)
    gone = np.zeros(blocks, bool)
    left = {cut.layer: np.setdiff1d(cut.positions // block, cut.kept // block) for cut in cuts}
    for layer in range(llm.config.n_layers):
        if layer >= first:
            attended += watcher.by_layer[layer]
            missed += watcher.by_layer[layer] * gone
        gone[left.get(layer, [])] = True
    behind = max(1, llm.config.n_layers - first)
    before = np.array(logits[: len(answer)])
    after = [pruned.logits]
    for token in answer[:-1]:
        pruned.extend([token])
        after.append(pruned.logits)
    beside = np.array(after)
    return Comparison(
        answer=llm.tokenizer.decode(answer, special=True),
        tokens=len(answer),
        nats_dense=float(nll(before, answer).sum()),
        nats_plan=float(nll(beside, answer).sum()),
        kl=float(kl(before[:1], beside[:1])[0]),
        attended=tuple((attended / behind).tolist()),
        missed=tuple((missed / behind).tolist()),
    )
