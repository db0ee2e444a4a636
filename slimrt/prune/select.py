"""Which rows of the prompt go on: schedule + scores -> kept rows. Pure functions (SlimInfer, arXiv 2508.06447)."""

from __future__ import annotations

import numpy as np

from slimrt.prune.schedule import Cut, Schedule

__all__ = ["kept_blocks", "ranking", "rivals", "select_rows"]


def rivals(rule: Schedule, blocks: int, rows: int) -> np.ndarray:
    """Which of ``blocks`` blocks of ``rows`` active rows compete, [B] bool: all but those that stay by their place."""
    competing = np.ones(blocks, bool)
    competing[: rule.first_blocks] = False
    competing[max(0, blocks - rule.last_blocks(rows)) :] = False
    return competing


def ranking(rule: Schedule, scores: np.ndarray, rows: int) -> np.ndarray:
    """All blocks [B], the most wanted first: those that stay by their place, then by score.

    ``scores`` [B], none negative, belong to the blocks of the ``rows`` rows that are active now. A block is wanted for
    its own score or for what is left (``plan.follow``) of its predecessor's. Ties go to the earlier block.
    """
    return np.argsort(-_wanted(rule, scores, rows), kind="stable")


def _wanted(rule: Schedule, scores: np.ndarray, rows: int) -> np.ndarray:
    wanted = scores.astype(np.float64)
    wanted[1:] = np.maximum(wanted[1:], rule.plan.follow * wanted[:-1])
    wanted[~rivals(rule, len(scores), rows)] = np.inf
    return wanted


def kept_blocks(rule: Schedule, cut: Cut, scores: np.ndarray, rows: int) -> tuple[int, str]:
    """How many blocks go on at ``cut``, and in words why more than ``cut.blocks``, where more do."""
    if not cut.most:
        return cut.blocks, ""
    wanted, sure = _wanted(rule, scores, rows), rule.plan.sure
    certain = int((wanted >= sure).sum())
    if not (scores >= sure).any():
        return cut.most, f"no block is wanted for sure (at most {scores.max():.2f} of 1), so more stay"
    count = min(cut.most, max(cut.blocks, certain))
    return count, "more blocks than usual are wanted for sure" if count > cut.blocks else ""


def select_rows(rule: Schedule, cut: Cut, scores: np.ndarray, rows: int) -> tuple[np.ndarray, str]:
    """The rows that go on, ascending, and in words why more than usual do: those of the blocks that are wanted most."""
    count, why = kept_blocks(rule, cut, scores, rows)
    kept = np.sort(ranking(rule, scores, rows)[:count])
    picked = (kept[:, None] * rule.plan.block + np.arange(rule.plan.block)).reshape(-1)
    return picked[picked < rows], why
