"""A conversation: the tokens read so far, their cache, and how much of it the next prompt can use again."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import numpy as np

from slimrt.config import context_advice
from slimrt.context import Context, Kept, Progress, Trace
from slimrt.engine import Engine
from slimrt.errors import ContextError, SettingError, TokenizerError
from slimrt.kv.boundary import BoundaryStates
from slimrt.ops.forks import after_fork
from slimrt.ops.protocol import Fetched
from slimrt.prune.asked import Asked
from slimrt.prune.plan import PrunePlan
from slimrt.prune.schedule import Schedule
from slimrt.reuse import Choice, Held, LastCut, Reading, common_prefix

Other = TypeVar("Other", bound="Session")


@dataclass(frozen=True)
class _Undo:
    """What is left of a call that does not end: its first ``length`` tokens; ``cut``: it may have cleared the stages
    behind the first cut. ``marks``: of which states at the boundary, and which of them had attended."""

    length: int
    cut: bool = False
    marks: tuple[BoundaryStates, np.ndarray] | None = None


class Session:
    """The tokens of one conversation and what the model made of them.

    ``logits`` [V] are those after the last token (None while there is none). ``revision`` counts the changes, so that a
    generation can tell that somebody else moved the session on. ``asking`` tells which tokens of a prompt ask
    (``slimrt.text.asking``); None: the last ones.

    Several threads may use a session: each call is whole. Who needs several to be one holds ``lock`` meanwhile.
    A call that was interrupted (Ctrl-C, wherever it struck; a fork while another thread computed) leaves the session as
    it was before, but for the logits. What it had begun is undone at once, or by the next call.
    """

    def __init__(self, engine: Engine, ctx: int, asking: Callable[[Sequence[int]], Asked] | None = None) -> None:
        self.engine, self.ctx, self.asking = engine, ctx, asking
        self.tokens: list[int] = []
        self.logits: np.ndarray | None = None
        self.context = engine.new_context()
        self.revision = 0
        self.lock = threading.RLock()
        self._undo: _Undo | None = None  # while something is under way
        self._ahead: tuple[list[int], np.ndarray] | None = None  # tokens read by read_together, the logits after each
        self.adapters = engine.adapters  # what the model was when it read the tokens
        self._questions = 0  # prompts in a row that were cut, on the same document
        self._choice: Choice | None = None  # what the cuts of the last prompt chose, while it is there
        self._cut: LastCut | None = None
        after_fork(self, Session._forked)

    def _forked(self) -> None:
        self.lock = threading.RLock()

    def prefill(
        self,
        ids: Sequence[int],
        plan: PrunePlan | None = None,
        *,
        progress: Progress | None = None,
        trace: Trace | None = None,
    ) -> Reading:
        """Make the conversation equal ``ids``, computing only what its longest common prefix with them does not cover.

        With a ``plan`` that cuts at this length, the dense layers run for the new tokens only, and the pruned stages
        for all, over the blocks that the new last tokens choose: the result is that of a fresh prefill. Where just this
        prompt was read last, what they chose then is there and nothing runs again. A document that was read whole
        before (``complete``) is not cut: the result is that of a fresh prefill under the plan without its cuts.

        Raises ContextError if ``ids`` is empty or exceeds the context, TokenizerError for ids outside the vocabulary;
        the conversation is then as it was.
        """
        self.check(ids)
        with self.lock:
            self._mend()
            self.revision += 1
            changed = self._forget_others()
            if trace is None and self._held.answers(ids, plan):
                return self._again("the prompt was read before, and nothing of it runs again")
            rule = self._rule(ids, plan)
            found = self._from_library(ids, plan, rule)
            if trace is None and self._held.answers(ids, plan):
                return self._again(f"the prompt was read before{found}")
            if found:
                rule = self._rule(ids, plan)  # a document that was read whole is not cut
            of_use, note = self._held.reusable(ids, rule, self.engine.ops.exact_rows)
            note = changed or note + (found if of_use else "")
            if of_use is None:
                self.release(rule.boundary)
            else:
                self.truncate(of_use)
            reused = len(self.tokens)  # none where rows were lost
            stages = self._read(ids[reused:], rule, progress, trace)
            if rule.whole:
                self.context.boundary = None
            self._questions = (self._questions if 2 * reused > len(ids) else 0) + 1 if rule.cuts else 0
            reading = Reading.of(reused, note, rule, stages)
            self._cut = None
            if rule.cuts and plan is not None and self.logits is not None:
                self._cut = LastCut.of(ids, plan, rule)
                whys = tuple(stage.why for stage in stages)
                self._choice = Choice(len(ids), plan, reading, whys, self.logits.copy())
            return reading

    def _rule(self, ids: Sequence[int], plan: PrunePlan | None) -> Schedule:
        return self._held.rule(ids, plan, self.asking, whole=self._serves_whole(plan))

    def _serves_whole(self, plan: PrunePlan | None) -> bool:
        """Whether under ``plan`` a document of the library that was read whole takes the place of its cuts."""
        library = self.engine.library
        return library is not None and plan is not None and library.plan == plan

    def _again(self, note: str) -> Reading:
        """As after the last prompt, which comes once more."""
        choice = self._choice
        assert choice is not None
        self.truncate(choice.length)
        self.logits = choice.logits.copy()
        return dataclasses.replace(choice.reading, reused=choice.length, note=note)

    def complete(self, progress: Progress | None = None, begins: str | None = None) -> int:
        """Let the layers behind the first cut read all that is held, while nobody waits: from then on a question about
        it costs what it costs without cuts, and is answered as without. Returns the tokens of the last prompt, for
        ``keep``; 0 where nothing was left to do (``incomplete``).

        Once the layers up to a later cut have read it, a question is chosen for from there on only, also where the
        call does not end; with ``begins``, the first words, the library gets what there is then. A call that does not
        end leaves the conversation without its last tokens, at most ``ops.exact_rows``.
        """
        with self.lock:
            self._mend()
            if not self.incomplete:
                return 0
            context, tokens, cut = self.context, list(self.tokens), self._cut
            assert cut is not None and context.boundary is not None
            first, library = context.boundary.layer, self.engine.library
            moves = tuple(layer for layer in cut.later if layer > first)
            rule = Schedule(cut.plan, windows=context.windows, boundary=first, whole=True, moves=moves)
            self.truncate(max(0, len(tokens) - self.engine.ops.exact_rows))
            self.revision += 1

            def told(done: int, total: int) -> None:
                if begins is not None and library is not None and done - 1 in moves:
                    library.keep(self.engine, context, tokens, cut.length, begins, passing=True)
                if progress is not None:
                    progress(done, total)

            self._read(tokens[len(self.tokens) :], rule, told)
            context.boundary, self._questions, self._cut = None, 0, None
            return cut.length

    @property
    def incomplete(self) -> bool:
        """Whether the layers behind the first cut lack some of a prompt that was read under a plan for which a document
        that was read whole serves (one with an end of ``questions``, or the library's)."""
        if self._cut is None or self.context.boundary is None or self.adapters != self.engine.adapters:
            return False
        return bool(self._cut.plan.questions) or self._serves_whole(self._cut.plan)

    def _forget_others(self) -> str:
        """Forget what was read under other adapters than the engine's; in words, that it was, for the note."""
        if self.adapters == self.engine.adapters:
            return ""
        held = bool(self.tokens)
        self.release()
        return "the last conversation was read under other adapters" if held else ""

    @property
    def _held(self) -> Held:
        return Held(self.tokens, self.context, self.engine.config.n_layers, self._questions, self._choice)

    def release(self, boundary: int | None = None) -> None:
        """Forget everything and give its memory back; ``boundary``: where the next prompt keeps hidden states."""
        with self.lock:
            self.reset()
            old, self.context = self.context, self.engine.new_context(boundary)
            self.adapters = self.engine.adapters
            old.cache.close()  # before the new one allocates what it stages copies in

    def replace(self, context: Context, tokens: list[int], logits: np.ndarray | None) -> None:
        """Become the conversation of ``tokens`` that ``context`` holds."""
        with self.lock:
            self.release()
            old, self.context, self.tokens, self.logits = self.context, context, tokens, logits
            self._choice = self._cut = None
            old.cache.close()

    def _from_library(self, ids: Sequence[int], plan: PrunePlan | None, rule: Schedule) -> str:
        """Become what the library has of the prompt, where that is more than is held; in words, for the note."""
        library = self.engine.library
        if library is None or rule.whole:
            return ""
        held = common_prefix(self.tokens, ids)
        found = library.find(self.engine, ids, plan, rule, held)
        if found is None:
            return ""
        self.replace(found.context, found.tokens, found.logits)
        self._questions = 0
        if found.logits is not None and plan is not None:
            positions = [found.context.cache.positions(cut.layer + 1) for cut in rule.cuts]
            stages = [Kept(*one) for one in zip(positions, found.whys, strict=True)]
            self._cut = LastCut.of(ids, plan, rule)
            self._choice = Choice(len(ids), plan, Reading.of(len(ids), "", rule, stages), found.whys, found.logits)
        return " (from the library on disk)"

    def keep(self, count: int, begins: str) -> None:
        """Let the library, if there is one, have the first ``count`` tokens as they were read; ``begins``: their first
        words."""
        library = self.engine.library
        if library is None or (self._cut is not None and self._cut.passed):  # it has the layers before, and soon all
            return
        with self.lock:
            self._mend()
            if len(self.tokens) >= count and self.adapters == self.engine.adapters:
                choice = self._choice if self._choice is not None and self._choice.length == count else None
                library.keep(self.engine, self.context, self.tokens, count, begins, choice)

    def fork(self) -> Session:
        """A session of its own that has read the same tokens: what the model made of them is copied, not read again.

        So ten questions on one document cost one reading. A copy takes the memory of the original (``kv_bytes``).
        """
        return self._copied_into(Session(self.engine, self.ctx, self.asking))

    def _copied_into(self, other: Other) -> Other:
        """``other``, a new session, as the equal of this one."""
        with self.lock, self.engine.ops.computing():
            self._mend()
            unused, other.context = other.context, copy.deepcopy(self.context)
            other.tokens, other._questions = list(self.tokens), self._questions
            other._choice, other._cut = self._choice, self._cut
            other.adapters = self.adapters
            other.logits = None if self.logits is None else self.logits.copy()
            unused.cache.close()
        return other

    def extend(self, ids: Sequence[int], *, progress: Progress | None = None) -> None:
        """Read further tokens through all layers, as decode does. Raises as ``prefill`` does."""
        with self.lock:
            self._check_further(ids)
            self.revision += 1
            self._read(ids, None, progress)

    def decode(self, ids: Sequence[int], guesses: Sequence[int] = (), *, alike: bool = True) -> np.ndarray:
        """Read further tokens as decode does one after the other, bit for bit, but several in one pass where the
        backend can (``alike``: see ``Engine.decode``).

        Returns the logits [1 + G, V] after ``ids`` and after each of the G ``guesses`` behind them. A guess joins
        ``tokens`` by ``accept``, in order; ``settle`` forgets the others. Raises as ``extend``.
        """
        with self.lock:
            further = [*ids, *guesses]
            ahead = self._taken_ahead(further)
            if ahead is None:
                self._check_further(further)
            self.revision += 1
            self._undo = _Undo(len(self.tokens))
            try:
                logits = self.engine.decode(self.context, further, alike=alike) if ahead is None else ahead
                logits = logits[len(ids) - 1 :]
                self.tokens.extend(ids)
                self.logits = logits[0]
                self._undo = _Undo(len(self.tokens)) if guesses else None
            except BaseException:
                self._mend()
                raise
        return logits

    @staticmethod
    def read_together(wanted: Sequence[tuple[Session, Sequence[int]]]) -> None:
        """Read tokens behind several sessions of one engine in one pass, as many as its ``together`` says in all; the
        next ``decode`` of just these tokens finds it done. Any other call of a session forgets them.

        Raises what ``extend`` raises, then for none of them is it done.
        """
        with contextlib.ExitStack() as locks:
            for session, ids in wanted:
                locks.enter_context(session.lock)
                session._check_further(ids)
                session._undo = _Undo(len(session.tokens))
            try:
                rows = wanted[0][0].engine.decode_together([(session.context, ids) for session, ids in wanted])
                for (session, ids), logits in zip(wanted, rows, strict=True):
                    session._ahead = list(ids), logits
            except BaseException:
                for session, _ in wanted:
                    session._mend()
                raise

    def holds_ahead(self, ids: Sequence[int]) -> bool:
        """Whether just ``ids`` were read by ``read_together``, and nothing happened since."""
        return self._ahead is not None and self._ahead[0] == list(ids)

    def _taken_ahead(self, ids: list[int]) -> np.ndarray | None:
        """The logits of ``ids``, where just these were read by ``read_together``."""
        ahead, self._ahead = self._ahead, None
        same = ahead is not None and ahead[0] == ids and self.adapters == self.engine.adapters
        return ahead[1] if ahead is not None and same else None

    def accept(self, guess: int) -> None:
        """The next of the guesses that were read last is right."""
        self.tokens.append(guess)
        self._undo = _Undo(len(self.tokens))

    def settle(self, logits: np.ndarray) -> None:
        """Forget the guesses that were not accepted; ``logits`` [V]: those after the last that was."""
        if self.context.length > len(self.tokens):
            self.context.truncate(len(self.tokens))
        self.logits, self._undo = logits, None

    def take_back(self, length: int, logits: np.ndarray) -> None:
        """Forget the tokens from index ``length`` on; ``logits`` [V] are those after the last one left."""
        with self.lock:
            self.truncate(length)
            self.logits = logits

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SettingError(
            "a session cannot be pickled or copied; fork() goes its own way from here, save() writes it to a file"
        )

    def _check_further(self, ids: Sequence[int]) -> None:
        """Raise what reading ``ids`` behind all that was read would."""
        self._mend()
        if self.adapters != self.engine.adapters:
            if self.tokens:
                raise SettingError(
                    "the conversation was read under other adapters than are set now; read its prompt again, or set "
                    "them as they were"
                )
            self.adapters = self.engine.adapters
        self.check(ids, len(self.tokens))
        if self.context.length and not self.context.cache.length(self.engine.config.n_layers - 1):
            raise ContextError(
                "the last prompt was interrupted before its end, and what followed its first cut is not computed; "
                "read a prompt before you go on"
            )

    def _read(
        self,
        ids: Sequence[int],
        rule: Schedule | None,
        progress: Progress | None,
        trace: Trace | None = None,
    ) -> tuple[Kept, ...]:
        """Read on by ``rule`` as the end of a prompt, or (None) as decode does."""
        # Until the work is done the tokens are not part of the conversation.
        stages: tuple[Kept, ...] = ()
        if rule is not None:
            self._choice = None
        states = self.context.boundary
        marks = None if rule is None or states is None else (states, states.marks())
        self._undo = _Undo(len(self.tokens), rule is not None and rule.anew, marks)
        revision = self.revision

        def told(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            if self.revision != revision:  # by the same thread, which holds the lock
                raise SettingError(
                    "the progress callback read or forgot something in the session whose progress it was told; use a "
                    "session of its own there"
                )

        try:
            if rule is not None:
                hidden, stages = self.engine.prefill(self.context, ids, rule, progress=told, trace=trace)
                logits = self.engine.logits(hidden)[0]
            elif len(ids) == 1:
                logits = self.engine.decode_one_token(self.context, ids[0])
            else:
                logits = self.engine.logits(self.engine.extend(self.context, ids, progress=told))[0]
            self.tokens.extend(ids)
            self.logits = logits
            self._undo = None
        except BaseException:
            if self.revision != revision:
                self._undo = _Undo(0)  # rows of two texts
            self._mend()
            raise
        return stages

    def _mend(self) -> None:
        """Undo what a call had begun that did not end."""
        undo, self._ahead = self._undo, None
        if undo is None:
            return
        length = undo.length if self.context.cache.intact else 0
        del self.tokens[length:]
        self.logits = None
        if undo.marks is not None:  # what a question chose that was not read is not to be told from what none did
            undo.marks[0].reset(undo.marks[1])
        self.context.truncate(length)
        if self._choice is not None and length < self._choice.length:
            self._choice = None
        self._cut = None if self._cut is None else self._cut.up_to(length)
        if undo.cut and length:
            # The stages behind the cut hold rows of two prompts. A prompt with cuts computes them again in any case.
            boundary = self._held.boundary_layer
            assert boundary is not None
            self.context.cache.clear(boundary + 1)
        self._undo = None

    def check(self, ids: Sequence[int], held: int = 0) -> None:
        """Raise what reading ``ids`` after ``held`` tokens would: see ``prefill``."""
        length = held + len(ids)
        if not len(ids):
            raise ContextError("the prompt has no tokens; at least one is needed; give some text")
        if length > self.ctx:
            raise ContextError(
                f"the prompt brings the conversation to {length} tokens, the context holds {self.ctx}; "
                f"shorten it, or {context_advice(length, self.engine.config.ctx_train)}"
            )
        vocab = self.engine.config.vocab_size
        for token in ids:
            if not 0 <= token < vocab:
                raise TokenizerError(f"token id {token}: ids lie in 0..{vocab - 1}; use this model's tokenizer")

    def truncate(self, length: int) -> None:
        """Forget all tokens from index ``length`` on."""
        with self.lock:
            self._mend()
            self.revision += 1
            self._undo = _Undo(min(length, len(self.tokens)))
            self._mend()

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held, resident or in host memory."""
        return self.kv_bytes_device + self.kv_bytes_host

    @property
    def fetched(self) -> Fetched:
        """What decode asked the host for under a budget, since the conversation's cache was made."""
        return self.context.cache.fetched

    @property
    def kv_bytes_device(self) -> int:
        """Bytes of keys and values that decode reads without fetching them."""
        return self.context.cache.nbytes_device

    @property
    def kv_bytes_host(self) -> int:
        """Bytes of keys and values in host memory, under a budget."""
        return self.context.cache.nbytes_host
