"""Drawing the next tokens from a session: one at a time, or as many as were guessed right.

A guess is read together with the token before it, and then drawn for as if nobody had guessed: the sampler, with the
same random numbers, the grammar and the penalties choose the token after each one that was right, and the first that
differs from its guess is simply the next token. So the text does not depend on what was guessed. (This is speculative
decoding, arXiv 2211.17192, for guesses that are certain of themselves.)
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from slimrt.drafting.lookup import Lookup
from slimrt.drafting.model import DraftModel
from slimrt.drafting.pace import EACH_WITH_EXPERTS, MOST, Costs
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.prune.plan import PrunePlan
from slimrt.request import GenerationRequest
from slimrt.results import TokenLogprob
from slimrt.sampler import Sampler, top_logprobs
from slimrt.session import Session
from slimrt.structured.guide import Guide

__all__ = ["Drawing", "Guesses", "Turn", "Written", "check_draft"]

_WORTH_UNPACKING = 24  # tokens that take as long in small passes as in one that unpacks every layer (2 cores, AVX2)
SINK_TOKENS = 4  # first tokens that stay where text has no system message (StreamingLLM, arXiv 2309.17453)

_COSTS: weakref.WeakKeyDictionary[Engine, Costs] = weakref.WeakKeyDictionary()


class Drafter(Protocol):
    """Guesses the next tokens of one text."""

    def guess(self, most: int, costs: Costs) -> list[int]:
        """The next tokens, as many as pay, at most ``most``."""

    def wrote(self, tokens: list[int]) -> None:
        """``tokens`` came next."""


@dataclass
class Guesses:
    """How many tokens were guessed, and how many of them were right."""

    made: int = 0
    right: int = 0


@dataclass(frozen=True)
class Written:
    """A token of the text. When it was drawn, the session had ``length`` tokens and these ``logits`` [V]."""

    token: int
    logprob: TokenLogprob | None
    length: int
    logits: np.ndarray


@dataclass(frozen=True)
class Turn:
    """What one pass brought. ``ended``: behind it a token was drawn that ends the text; ``dropped``: tokens that left
    the full context before."""

    written: list[Written]
    ended: bool
    dropped: int


def check_draft(request: GenerationRequest, session: Session) -> None:
    """Raise SettingError where ``request`` asks for guesses that cannot help in ``session``."""
    engine = session.engine
    asked = engine.draft if request.draft == "auto" else request.draft
    if asked is None or asked == "auto" or engine.together > 1:
        return
    if engine.budgeted:
        raise SettingError(
            f"draft {asked!s}: under a KV budget each token chooses for itself what it reads, and guesses cannot be "
            f"read together on backend {engine.ops.name}; leave it out (draft=None)"
        )


class Drawing:
    """Draws the tokens of one text, which goes on behind what ``session`` has read."""

    def __init__(
        self,
        session: Session,
        request: GenerationRequest,
        sampler: Sampler,
        guide: Guide | None,
        stops: Collection[int],
        plan: PrunePlan | None,
        revision: int | None,
        count: Guesses | None,
    ) -> None:
        """``stops``: tokens that end the text; ``plan``, ``revision``: see ``generation.generate_tokens``."""
        self._session, self._request, self._guide, self._stops = session, request, guide, stops
        self._plan, self._revision, self._count = plan, revision, Guesses() if count is None else count
        self._sampler = sampler
        self._unread: list[int] = []  # written, and read with the next turn: a token drawn and those that are forced
        costs = Costs(EACH_WITH_EXPERTS) if session.engine.config.experts else Costs()
        self._costs = _COSTS.setdefault(session.engine, costs)
        self._drafter: Drafter | None = None
        self._begun = False
        self._foreseen: list[int] | None = None  # guesses of the next turn, if they were made before it
        self._left: int | None = None  # tokens that may still be drawn after this turn

    def turn(self, left: int | None) -> Turn | None:
        """Read what was drawn last and draw on, at most ``left`` tokens; None where the context is full."""
        session, request, dropped = self._session, self._request, 0
        with session.lock:  # between two turns others may have theirs, but not between reading and drawing
            self._check_revision()
            if not self._begun:
                self._begun, self._drafter = True, self._new_drafter()
            guesses: list[int] = []
            if not self._unread:
                if session.logits is None:
                    raise SettingError("nothing was read yet; a generation starts from a prompt; call prefill first")
                rows = session.logits[None]
            elif len(session.tokens) + len(self._unread) <= session.ctx:
                guesses = self._guesses(left) if self._foreseen is None else self._foreseen
                rows = self._read(guesses)
            elif request.overflow == "shift":
                kept = _shifted(session.tokens, SINK_TOKENS if request.n_keep is None else request.n_keep)
                dropped = len(session.tokens) - len(kept)
                session.prefill([*kept, *self._unread], self._plan)
                assert session.logits is not None
                rows = session.logits[None]
            else:
                return None
            self._revision, self._foreseen = session.revision, None
            written, ended = self._draw(rows, guesses, left)
            self._left = None if left is None else left - len(written)
        if self._drafter is not None:
            self._drafter.wrote([one.token for one in written])
        return Turn(written, ended, dropped)

    def next_tokens(self) -> list[int]:
        """What the next turn will read, so that others' tokens can be read with them (``Session.read_together``); none
        where it cannot, or where no turn comes."""
        session, guide = self._session, self._guide
        if not self._unread or self._left == 0 or (guide is not None and guide.done):
            return []
        with session.lock:
            held = session.revision == self._revision and len(session.tokens) + len(self._unread) <= session.ctx
            if not held or session.engine.together == 1:
                return []
            if self._foreseen is None:
                self._foreseen = self._guesses(self._left)
            return [*self._unread, *self._foreseen]

    def take_back(self, last: Written) -> None:
        """The text ends with ``last``, though more was drawn: the session is as it was when that one was drawn."""
        session = self._session
        if len(session.tokens) > last.length:
            with session.lock:
                if session.revision == self._revision:
                    session.take_back(last.length, last.logits)

    def _check_revision(self) -> None:
        if self._revision is not None and self._session.revision != self._revision:
            raise SettingError("the session read something else while this text was written; use a session for each")

    def _new_drafter(self) -> Drafter | None:
        session = self._session
        if self._request.one_by_one:
            return None
        check_draft(self._request, session)
        asked: Any = session.engine.draft if self._request.draft == "auto" else self._request.draft
        if asked is None or (asked == "auto" and session.engine.together == 1):
            return None
        return asked.follow(session) if isinstance(asked, DraftModel) else Lookup(session.tokens)

    def _guesses(self, left: int | None) -> list[int]:
        """What may follow the tokens that are to be read."""
        if self._drafter is None:
            return []
        session = self._session
        together = session.engine.together  # 1: guesses were asked for where a pass of several rounds otherwise
        rows = MOST + 1 if together == 1 else together
        room = min(session.ctx - len(session.tokens), rows) - len(self._unread)
        most = room if left is None else min(room, left - 1)
        guesses = self._drafter.guess(max(0, most), self._costs)
        return guesses[: self._guide.valid(guesses)] if self._guide is not None and guesses else guesses

    def _read(self, guesses: list[int]) -> np.ndarray:
        """Read what is unread and ``guesses`` behind it, in the way that costs least; the logits [1 + G, V] from which
        the next tokens are drawn."""
        session, ids = self._session, self._unread
        engine, begun = session.engine, time.perf_counter()
        together = session.holds_ahead([*ids, *guesses])  # what it took is not known for these alone
        if engine.together > 1 or guesses:
            rows = session.decode(ids, guesses, alike=not guesses)
        else:
            few = max(1, engine.ops.unpack_rows - 1)
            part = few if len(ids) < _WORTH_UNPACKING else len(ids)
            for at in range(0, len(ids), part):
                session.extend(ids[at : at + part])
            assert session.logits is not None
            rows = session.logits[None]
        if not together:
            self._costs.note(len(ids) + len(guesses), time.perf_counter() - begun)
        self._count.made += len(guesses)
        return rows

    def _draw(self, rows: np.ndarray, guesses: list[int], left: int | None) -> tuple[list[Written], bool]:
        """Draw from the first of ``rows``, and from each further one if all before it were guessed right."""
        session, guide, request = self._session, self._guide, self._request
        written: list[Written] = []
        right, ended = 0, False
        while True:
            logits = rows[right]
            token = self._sampler(logits, session.tokens, guide)
            if token in self._stops:
                self._unread, ended = [], True
                break
            logprob = None if request.logprobs is None else top_logprobs(logits, token, request.logprobs)
            new, length = [token], len(session.tokens)
            if guide is not None:
                guide.take(token)
                if logprob is None and not request.one_by_one:
                    room = session.ctx - length - 1
                    new += guide.forced(room if left is None else min(room, left - len(written) - 1))
            written.append(Written(token, logprob, length, logits))
            written += [Written(one, None, length, logits) for one in new[1:]]
            same = 0
            if guide is None or not guide.done:
                while same < len(new) and right + same < len(guesses) and new[same] == guesses[right + same]:
                    session.accept(new[same])
                    same += 1
            right += same
            self._unread = new[same:]
            if self._unread:
                break
        self._count.right += right
        if guesses:
            session.settle(rows[right])
        return written, ended


def _shifted(tokens: list[int], n_keep: int) -> list[int]:
    """What stays of a full context: the first ``n_keep`` tokens and the newer half of the rest; fewer in any case."""
    n_keep = min(n_keep, len(tokens) - 1)
    rest = len(tokens) - n_keep
    return tokens[:n_keep] + tokens[len(tokens) - rest // 2 :]
