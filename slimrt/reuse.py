"""What of a conversation the next prompt can use again, and what a plan does to the prompt after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slimrt.context import Context, Kept
from slimrt.kv.cache import KVCache
from slimrt.prune.asked import ASKED, Asked
from slimrt.prune.plan import PrunePlan
from slimrt.prune.reach import contiguous
from slimrt.prune.schedule import Schedule, schedule

__all__ = ["Choice", "Held", "LastCut", "Reading", "common_prefix"]

_GROWN = 512  # rows that a conversation grows by, under a plan without cuts, before its windows move on


@dataclass(frozen=True)
class Reading:
    """How a prompt was read: tokens that an earlier call had done already and why not more; tokens each cut kept; first
    tokens under windows; why it ran dense although there is a plan; what was in doubt, so that more was kept; which
    tokens each cut kept, as runs (first, behind the last)."""

    reused: int
    note: str
    stages: tuple[int, ...] = ()
    windowed: int = 0
    dense: str = ""
    doubts: tuple[str, ...] = ()
    kept: tuple[tuple[tuple[int, int], ...], ...] = ()

    @classmethod
    def of(cls, reused: int, note: str, rule: Schedule, stages: Sequence[Kept]) -> Reading:
        """Of a prompt that was read by ``rule``, whose cuts kept ``stages``."""
        sizes, runs = tuple(len(one.positions) for one in stages), tuple(_runs(one.positions) for one in stages)
        return cls(reused, note, sizes, rule.windows.rows, rule.why_dense, _doubts(rule, stages), runs)


@dataclass(frozen=True)
class Choice:
    """What the cuts of ``plan`` made of a prompt of ``length`` tokens: how it was read, for each cut in words why more
    than usual stayed, and the logits [V] after it. As long as the layers behind the cuts hold what they chose, the same
    prompt need not be read again."""

    length: int
    plan: PrunePlan
    reading: Reading
    whys: tuple[str, ...]
    logits: np.ndarray


@dataclass(frozen=True)
class LastCut:
    """The last prompt of ``length`` tokens was cut, under ``plan``, behind the first cut once more at the layers
    ``later``. ``passed``: as ``Schedule`` has it."""

    length: int
    plan: PrunePlan
    later: tuple[int, ...] = ()
    passed: bool = False

    @classmethod
    def of(cls, ids: Sequence[int], plan: PrunePlan, rule: Schedule) -> LastCut:
        return cls(len(ids), plan, tuple(cut.layer for cut in rule.cuts[1:]), rule.passed)

    def up_to(self, length: int) -> LastCut | None:
        """Of so much of the prompt as ``length`` tokens of the conversation leave."""
        return dataclasses.replace(self, length=min(length, self.length)) if length else None


@dataclass(frozen=True)
class Held:
    """What there is before a prompt: the ``tokens`` of the conversation and the ``context`` that read them, of a model
    with so many ``layers``; ``questions``: prompts in a row that were cut, on the same document. ``choice``: what the
    cuts of the last prompt chose, where it is held still."""

    tokens: Sequence[int]
    context: Context
    layers: int
    questions: int = 0
    choice: Choice | None = None

    @property
    def boundary_layer(self) -> int | None:
        """The layer of the first cut that hidden states are kept at."""
        boundary = self.context.boundary
        return None if boundary is None else boundary.layer

    @property
    def pruned(self) -> bool:
        """Whether the last layers lack some of the tokens."""
        return self.context.cache.length(self.layers - 1) < self.context.length

    def about_the_same(self, ids: Sequence[int]) -> bool:
        """Whether most of the prompt ``ids`` is held, so that it asks about the same document."""
        return 2 * common_prefix(self.tokens, ids) > len(ids)

    def answers(self, ids: Sequence[int], plan: PrunePlan | None) -> bool:
        """Whether just the prompt ``ids`` was read under ``plan``, and what its cuts chose is held."""
        choice = self.choice
        same = choice is not None and choice.length == len(ids) == common_prefix(self.tokens, ids)
        return same and choice is not None and choice.plan == plan and isinstance(self.context.cache, KVCache)

    def rule(
        self,
        ids: Sequence[int],
        plan: PrunePlan | None,
        asking: Callable[[Sequence[int]], Asked] | None,
        *,
        whole: bool = False,
    ) -> Schedule:
        """What ``plan`` does to the prompt ``ids``, after what was read before. ``whole``: a document that was read
        whole serves in any case, not only where the plan has an end of ``questions``."""
        asked = None
        if plan is not None and plan.score == ASKED and asking is not None and len(ids) >= plan.min_tokens:
            asked = asking(ids)
        rule = self._worth_its_cuts(schedule(plan, len(ids), asked), ids, whole)
        grown = rule.windows.rows - self.context.windows.rows
        if not rule.plan.stages and rule.windows.reach == self.context.windows.reach and 0 < grown <= _GROWN:
            # Rows that saw everything when they were the last ones need not be read again for some tokens more.
            rule = dataclasses.replace(rule, windows=self.context.windows)
        return rule

    def _worth_its_cuts(self, rule: Schedule, ids: Sequence[int], whole: bool) -> Schedule:
        """``rule``, or in its place one that reads the document whole, where its plan has an end of ``questions``.

        A cut saves much once and costs something at each further question. Who has asked so often will ask again.
        """
        plan, held = rule.plan, self.context
        if not (rule.cuts and (plan.questions or whole) and self.about_the_same(ids)):
            return rule
        if held.windows.reach != rule.windows.reach:
            return rule
        rule = self._without_what_was_read(rule)
        if self.boundary_layer in (None, rule.boundary) and not self.pruned:
            why = "the document was read whole before, and a further question costs little"
            rule = dataclasses.replace(rule, cuts=(), why_dense=why)
            keeps_states = self.boundary_layer is not None  # it was too short for a cut then
            return rule if keeps_states else dataclasses.replace(rule, plan=plan.without_cuts, boundary=None)
        if self.boundary_layer == rule.boundary and plan.questions and self.questions >= plan.questions:
            why = f"after {plan.questions} questions the document is read whole, so that further ones cost little"
            return dataclasses.replace(rule, cuts=(), whole=True, why_dense=why)
        return rule

    def _without_what_was_read(self, rule: Schedule) -> Schedule:
        """``rule`` without the cuts before a later one up to which the layers read the document whole: it need not be
        chosen again what passes them."""
        for at, cut in enumerate(rule.cuts):
            if at and cut.layer == self.boundary_layer:
                return dataclasses.replace(rule, cuts=rule.cuts[at:], boundary=cut.layer, passed=True)
        return rule

    def reusable(self, ids: Sequence[int], rule: Schedule, exact_rows: int) -> tuple[int | None, str]:
        """How many first tokens of a prompt need not be read again, and why not more; None: nothing that is held is of
        use. ``exact_rows``: the last rows that a backend must read together to give a fresh prompt's bits."""
        # These are always computed, so that the choice is made by the queries of the new last tokens.
        fresh = rule.fresh_rows if rule.cuts else exact_rows
        same = common_prefix(self.tokens, ids)
        same_rows = self.context.windows.same_rows(rule.windows)
        if rule.boundary != self.boundary_layer or not same_rows or (self.pruned and not rule.anew):
            return None, "the last conversation was pruned otherwise" if self.tokens else "nothing read before"
        reused, note = max(0, min(same, len(ids) - fresh)), self._note(same, len(ids))
        if same_rows < reused:
            reused = int(same_rows)
            note += f"; from token {reused} on it runs again, for what saw everything there is under windows now"
        boundary = self.context.boundary
        head = len(rule.asked.head) if rule.cuts and rule.asked is not None else 0
        if boundary is not None and boundary.first_length < min(head, reused):
            # Of what asks before a document the queries must be there; tokens that were decoded left none.
            reused = boundary.first_length
            note += f"; from token {reused} on it runs again, for nothing tells what was asked there"
        return reused, note

    def _note(self, same: int, length: int) -> str:
        if not self.tokens:
            return "nothing read before"
        if same == 0:
            return "the first token differs from the last conversation's"
        if same == length:
            return "the prompt was read before; only its end runs again"
        if same == len(self.tokens):
            return "the prompt continues the last conversation"
        return f"the prompt departs from the last conversation after token {same}"


def common_prefix(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(differs[0]) if len(differs) else length


def _runs(positions: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Rising ``positions`` as runs (first, behind the last)."""
    return tuple((int(positions[some][0]), int(positions[some][-1]) + 1) for some in contiguous(positions))


def _doubts(rule: Schedule, stages: Sequence[Kept]) -> tuple[str, ...]:
    """In words, why more of a prompt was kept than usual, or why it was cut later."""
    late: tuple[str, ...] = (
        () if not rule.left_out else ("a question stands before the document: no cut in early layers",)
    )
    if rule.passed:
        late += (f"the layers up to {rule.boundary} read the document whole before: no cut in them",)
    return late + tuple(f"layer {cut.layer}: {one.why}" for cut, one in zip(rule.cuts, stages, strict=True) if one.why)
