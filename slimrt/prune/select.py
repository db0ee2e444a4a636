"""Which rows of the prompt go on: plan + scores -> kept row indices. Pure functions (SlimInfer, arXiv 2508.06447)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from slimrt.config import ModelConfig, PrunePlan
from slimrt.errors import SettingError
from slimrt.prune.reach import RUN
from slimrt.prune.scores import BLOCK_SCORES

__all__ = ["Cut", "Windows", "check_plan", "local_blocks", "ranking", "schedule", "select_rows", "why_dense", "windows"]


@dataclass(frozen=True)
class Cut:
    """A stage of a plan for a prompt of known length: after ``layer``'s attention ``blocks`` blocks go on."""

    layer: int
    blocks: int


def check_plan(plan: PrunePlan, config: ModelConfig) -> None:
    """Raise SettingError if ``plan`` cannot be run on a model of these sizes."""
    if plan.score not in BLOCK_SCORES:
        raise SettingError(f"prune plan: score '{plan.score}'; known are {', '.join(BLOCK_SCORES)}")
    for stage in plan.stages:
        # The last layer computes the wanted rows only, so a cut there would cut nothing.
        if stage.layer >= config.n_layers - 1:
            raise SettingError(
                f"prune plan: layer {stage.layer}; this model has layers 0..{config.n_layers - 1} and cuts come before "
                "the last; use a plan made for this model"
            )
    for window in plan.windows:
        if window.layer >= config.n_layers or len(window.reach) != config.n_kv_heads:
            raise SettingError(
                f"prune plan: window of layer {window.layer} for {len(window.reach)} KV heads; this model has layers "
                f"0..{config.n_layers - 1} and {config.n_kv_heads} KV heads; use a plan made for this model"
            )


@dataclass(frozen=True)
class Windows:
    """How far back each KV head of a layer looks (layers that are not in ``reach`` see everything), in the first
    ``rows`` of a context; the rows behind them see everything too."""

    reach: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    rows: int = 0

    def same_rows(self, other: Windows) -> float:
        """How many first rows of a context come out the same under both: all (inf), or those before they differ."""
        if self == other:
            return math.inf
        return min(self.rows, other.rows) if self.reach == other.reach else 0


def windows(plan: PrunePlan | None, tokens: int) -> Windows:
    """The windows of ``plan`` for a prompt of ``tokens``: whole runs of rows, so that no tile is in two minds."""
    if plan is None or tokens < plan.min_tokens:
        return Windows()
    reach = {window.layer: window.reach for window in plan.windows if any(window.reach)}
    rows = max(0, tokens - plan.full_rows) // RUN * RUN
    return Windows(reach, rows) if reach and rows else Windows()


def schedule(plan: PrunePlan, tokens: int) -> tuple[Cut, ...]:
    """The cuts of ``plan`` for a prompt of ``tokens``; empty where every stage would keep everything (dense)."""
    if tokens < plan.min_tokens:
        return ()
    total = -(-tokens // plan.block)
    always = plan.sink_blocks + local_blocks(plan, tokens)
    cuts: list[Cut] = []
    for stage in plan.stages:
        keep = max(plan.min_keep, math.ceil(stage.keep * tokens)) if isinstance(stage.keep, float) else stage.keep
        blocks = max(always, -(-keep // plan.block))
        before = cuts[-1].blocks if cuts else total
        if blocks < before:
            cuts.append(Cut(stage.layer, blocks))
    if (
        not cuts and plan.keeps_all
    ):  # a plan that keeps everything runs through the same code, to be compared with dense
        cuts = [Cut(stage.layer, total) for stage in plan.stages]
    return tuple(cuts)


def why_dense(plan: PrunePlan, tokens: int) -> str:
    """Why a prompt of ``tokens`` runs dense although there is a plan, in words; empty if it does not."""
    if tokens < plan.min_tokens:
        return f"the prompt has {tokens:,} tokens, and this plan leaves prompts under {plan.min_tokens:,} whole"
    if schedule(plan, tokens) or windows(plan, tokens).rows:
        return ""
    return f"every stage of the plan would keep all of these {tokens:,} tokens"


def local_blocks(plan: PrunePlan, rows: int) -> int:
    """The last blocks that always stay: ``local_blocks`` whole ones, a ragged last one, all of the query window."""
    ragged = 1 if rows % plan.block else 0
    window = -(-rows // plan.block) - max(0, rows - plan.query_window) // plan.block
    return max(plan.local_blocks + ragged, window)


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
