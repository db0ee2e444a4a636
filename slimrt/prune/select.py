"""Which rows of the prompt go on: plan + scores -> kept row indices. Pure functions (SlimInfer, arXiv 2508.06447)."""

from __future__ import annotations

import numpy as np

from slimrt.prune.plan import PrunePlan
from slimrt.prune.schedule import Cut, local_blocks

__all__ = ["ranking", "select_rows"]


def ranking(plan: PrunePlan, scores: np.ndarray, rows: int) -> np.ndarray:
    """All blocks [B], the most wanted first: the sink and the local blocks, then by score.

    ``scores`` [B], none negative, belong to the blocks of the ``rows`` rows that are active now. A block is wanted for
    its own score or for what is left (``plan.follow``) of its predecessor's. Ties go to the earlier block.
    """
    wanted = scores.astype(np.float64)
    wanted[1:] = np.maximum(wanted[1:], plan.follow * wanted[:-1])
    wanted[: plan.sink_blocks] = np.inf
    wanted[max(0, len(scores) - local_blocks(plan, rows)) :] = np.inf
    return np.argsort(-wanted, kind="stable")


def select_rows(plan: PrunePlan, cut: Cut, scores: np.ndarray, rows: int) -> np.ndarray:
    """The rows that go on, ascending: those of the ``cut.blocks`` blocks that are wanted most (see ``ranking``)."""
    kept = np.sort(ranking(plan, scores, rows)[: cut.blocks])
    picked = (kept[:, None] * plan.block + np.arange(plan.block)).reshape(-1)
    return picked[picked < rows]
