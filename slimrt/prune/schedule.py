"""What a plan does to a prompt of known length, in one value: the cuts, the windows, and why it runs dense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slimrt.prune.asked import ASKED, Asked, asked_by_place
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.prune.reach import RUN

__all__ = ["DENSE", "Cut", "Schedule", "Windows", "schedule"]


@dataclass(frozen=True)
class Cut:
    """A stage of a plan for a prompt of known length: once ``layer`` has keys and values of all, ``blocks`` blocks go
    on, and as many as ``most`` where it is in doubt which (0: never more)."""

    layer: int
    blocks: int
    most: int = 0


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


@dataclass(frozen=True)
class Schedule:
    """How one prompt is read: all that the layer loop needs to know of the rule.

    ``cuts``: the layers at whose attention blocks of the prompt leave, chosen as ``plan`` says; none: every token
    passes every layer. ``windows``: how far back attention looks before the first cut. ``boundary``: the layer whose
    hidden states are kept for another question; that of the first stage also while a prompt is too short for a cut, as
    it may grow. ``why_dense``: in words, why a plan that could cut or limit something leaves this prompt whole.
    ``asked``: which tokens choose under the score of that name; None under the published ones. ``whole``: the layers
    behind the boundary read everything again, so that further prompts on the same document need no cuts; at the layers
    in ``moves`` the boundary moves on meanwhile, so that a reading which ends early leaves what it did. ``passed``: the
    layers up to the boundary read the document whole before, and cuts before it are left out.
    """

    plan: PrunePlan = field(default_factory=PrunePlan)
    cuts: tuple[Cut, ...] = ()
    windows: Windows = field(default_factory=Windows)
    boundary: int | None = None
    why_dense: str = ""
    asked: Asked | None = None
    whole: bool = False
    moves: tuple[int, ...] = ()
    passed: bool = False

    @property
    def anew(self) -> bool:
        """Whether the layers behind the boundary forget what they read before."""
        return bool(self.cuts) or self.whole

    @property
    def left_out(self) -> bool:
        """Whether stages are left out because a question stands before the document."""
        before = self.asked is not None and self.asked.before
        return before and any(stage.layer < self.plan.late for stage in self.plan.stages)

    @property
    def fresh_rows(self) -> int:
        """The last rows of a prompt that are always computed, so that its blocks are chosen by their queries."""
        return self.plan.query_window if self.asked is None else len(self.asked.tail)

    @property
    def first_blocks(self) -> int:
        """The first blocks that always stay: the sink, and what asks before the document."""
        asking = () if self.asked is None else self.asked.asking_blocks(self.plan.block)
        return max(self.plan.sink_blocks, *(block + 1 for block in asking), 0)

    def last_blocks(self, rows: int) -> int:
        """The last blocks of ``rows`` active rows that always stay: ``local_blocks`` whole ones, a ragged last one, all
        of the rows whose queries choose."""
        plan = self.plan
        ragged = 1 if rows % plan.block else 0
        window = -(-rows // plan.block) - max(0, rows - self.fresh_rows) // plan.block
        return max(plan.local_blocks + ragged, window)


_LEAST = 1 / 8  # of the active blocks: a cut that drops fewer is not made under the score "asked"
# Where further questions are expected (``questions``), the next one pays for what the last cut kept once more, the one
# after that for the rest. Of a short prompt ``min_keep`` is more than this share: then they cost more than was saved,
# and it is on short prompts that a cut costs a continuation most.
_LASTING = 0.45

DENSE = Schedule()


def schedule(plan: PrunePlan | None, tokens: int, asked: Asked | None = None) -> Schedule:
    """What ``plan`` (None: dense) does to a prompt of ``tokens``, of which ``asked`` ask (None: the last ones)."""
    if plan is None or plan.does_nothing:
        return DENSE
    if plan.score != ASKED:
        asked = None
    elif asked is None:
        asked = asked_by_place(tokens)
    stages = [stage for stage in plan.stages if asked is None or not asked.before or stage.layer >= plan.late]
    boundary = stages[0].layer if stages else None
    if tokens < plan.min_tokens:
        why = f"the prompt has {tokens:,} tokens, and this plan leaves prompts under {plan.min_tokens:,} whole"
        return Schedule(plan, boundary=boundary, why_dense=why, asked=asked)
    rule = Schedule(plan, boundary=boundary, asked=asked)
    cuts, why = _cuts(rule, stages, tokens), ""
    if cuts and plan.questions and _raised(plan, tokens, cuts[-1].blocks):
        cuts = ()
        why = f"{plan.min_keep:,} of {tokens:,} tokens would stay, and further questions cost more than that saves"
    if cuts:
        boundary = cuts[0].layer
    windows = _windows(plan, tokens, boundary)
    if not (cuts or windows.rows or why):
        why = f"every stage of the plan would keep all of these {tokens:,} tokens"
    return Schedule(plan, cuts, windows, boundary, why, asked)


def _windows(plan: PrunePlan, tokens: int, boundary: int | None) -> Windows:
    """Those of the layers up to the first cut, for whole runs of rows, so that no tile is in two minds."""
    reach = {
        window.layer: window.reach
        for window in plan.windows
        if any(window.reach) and (boundary is None or window.layer <= boundary)
    }
    rows = max(0, tokens - plan.full_rows) // RUN * RUN
    return Windows(reach, rows) if reach and rows else Windows()


def _cuts(rule: Schedule, stages: Sequence[Stage], tokens: int) -> tuple[Cut, ...]:
    """The stages that leave something out of a prompt of ``tokens``."""
    plan, total = rule.plan, -(-tokens // rule.plan.block)
    always = min(total, rule.first_blocks + rule.last_blocks(tokens))
    cuts: list[Cut] = []
    for stage in stages:
        keep = max(plan.min_keep, math.ceil(stage.keep * tokens)) if isinstance(stage.keep, float) else stage.keep
        blocks = max(always, -(-keep // plan.block))
        before = cuts[-1].blocks if cuts else total
        # What a cut costs (scores, and its stages again at each further question) it must save: an eighth at least.
        if blocks < before and (rule.asked is None or blocks <= before * (1 - _LEAST)):
            most = max(blocks, int(plan.most * total)) if rule.asked is not None and plan.sure else 0
            cuts.append(Cut(stage.layer, blocks, most))
    if not cuts and plan.keeps_all:
        # A plan that keeps everything runs through the same code, to be compared with dense.
        cuts = [Cut(stage.layer, total) for stage in plan.stages]
    return tuple(cuts)


def _raised(plan: PrunePlan, tokens: int, blocks: int) -> bool:
    """Whether ``min_keep`` leaves so much of a short prompt that its cuts are not worth it over a few questions."""
    wanted = min((stage.keep for stage in plan.stages if isinstance(stage.keep, float)), default=0.0)
    return blocks * plan.block > max(_LASTING, wanted) * tokens + plan.block
