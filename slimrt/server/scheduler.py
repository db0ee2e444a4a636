"""One thread computes; several requests have their turns.

A prompt is read layer by layer and within a layer some rows at a time, and between these others have their turns:
streams whose last token is some time ago get their next one, and a short prompt is read. So nobody waits behind a long
document. Streams that write at the same time are read in one pass over the weights where the backend gains by it.
Sessions are kept when a request has ended: the one that shares most with the next prompt serves it, and
what it has read of it is not read again. While nobody asks, what a prompt's cuts left unread of a document is read, so
that further questions cost little; the next request ends that at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

from slimrt.context import Progress
from slimrt.drafting.drawing import Drawing, Guesses
from slimrt.errors import SlimrtError
from slimrt.generation import Step, first_words, generate_tokens
from slimrt.library.store import LEAST
from slimrt.llm import LLM
from slimrt.request import GenerationRequest
from slimrt.reuse import Reading, common_prefix
from slimrt.session import Session

__all__ = ["Busy", "Ended", "Event", "Failed", "Job", "Piece", "Progressed", "Read", "Scheduler", "Stopping", "answers"]

log = logging.getLogger(__name__)

_TURN_S = 0.05  # a stream has its turn within a prompt of others when its last token is so long ago
_IDLE_S = 1.0  # nobody asked for so long: what was left unread is read
_SHORT = 512  # tokens: a prompt of no more that are new is read within a longer one


@dataclass(frozen=True)
class Progressed:
    """A prompt is being read: layers ``done`` of ``total``."""

    done: int
    total: int


@dataclass(frozen=True)
class Read:
    """The prompt is read, ``seconds`` after the request came. ``guesses`` counts on while the answers are written."""

    reading: Reading
    seconds: float
    guesses: Guesses


@dataclass(frozen=True)
class Piece:
    """A step of answer number ``index``."""

    index: int
    step: Step


@dataclass(frozen=True)
class Ended:
    """All answers are whole."""


@dataclass(frozen=True)
class Failed:
    """Nothing more comes. ``error``: what the caller can mend (SlimrtError), or a defect."""

    error: Exception


Event = Progressed | Read | Piece | Ended | Failed


class Busy(Exception):
    """The queue is full. ``seconds``: after which a request may find room."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {seconds} s")
        self.seconds = seconds


class Stopping(SlimrtError):
    """The server takes no more requests, and has no more time for those it took."""

    def __init__(self) -> None:
        super().__init__("the server is stopping; ask again in a while, or another one")


class _Cancelled(BaseException):
    """The client is gone; not an Exception, so that nobody takes it for a failure of the model."""


@dataclass(eq=False)
class Job:
    """A prompt to read and ``choices`` answers to write. ``put`` is called with each Event, from the computing thread;
    ``progress``: also with how far reading has come."""

    ids: Sequence[int]
    request: GenerationRequest
    put: Callable[[Event], None]
    choices: int = 1
    progress: bool = False
    cancelled: bool = False
    came: float = field(default_factory=time.monotonic)


def answers(
    llm: LLM,
    session: Session,
    ids: Sequence[int],
    request: GenerationRequest,
    choices: int,
    progress: Progress | None = None,
    came: float | None = None,
    draws: Callable[[Drawing], None] | None = None,
) -> Generator[Event, None, None]:
    """Read the prompt ``ids`` in ``session`` and write ``choices`` answers to it: Read, the Pieces, Ended; with a seed
    each draws from one of its own, the next number. Then the library, if there is one, gets what was read. ``came``:
    when the request did (None: now), by ``time.monotonic``; ``draws`` is given what draws each answer."""
    plan, begun, guesses = llm.plan.plan, time.monotonic() if came is None else came, Guesses()
    for index in range(choices):
        reading = session.prefill(ids, plan, progress=progress)
        if index == 0:
            yield Read(reading, time.monotonic() - begun, guesses)
        one = request
        if index and (seed := request.sampling.seed) is not None:
            one = replace(request, sampling=replace(request.sampling, seed=seed + index))
        for step in generate_tokens(session, llm.tokenizer, one, plan, count=guesses, begun=draws):
            yield Piece(index, step)
    yield Ended()
    session.keep(len(ids), first_words(llm.tokenizer, ids))


@dataclass(eq=False)
class _Running:
    job: Job
    session: Session
    steps: Generator[Event, None, None] = field(init=False)
    drawing: Drawing | None = None  # of the answer that is being written
    last: float = 0.0  # when its last token came
    busy: bool = False  # computing now, further down this thread's stack

    def draws(self, drawing: Drawing) -> None:
        """Another answer begins."""
        self.drawing = drawing


class Scheduler:
    """Runs jobs on ``llm`` in a thread of its own: at most ``sessions`` at a time, ``queue`` more wait."""

    def __init__(self, llm: LLM, *, sessions: int = 4, queue: int = 64) -> None:
        self._llm, self._most_waiting = llm, queue
        self._condition = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[_Running] = []
        self._free: list[Session] = []  # the one that was used longest ago first
        self._unmade = sessions
        self._closed = False
        self._seconds = 1.0  # that a job takes, on the whole
        # Passes of a GPU share scratch memory, so there a prompt is read in one go; it takes little time.
        self._takes_turns = llm.backend.ops.name != "cuda"
        self._reading: list[Job] = []  # whose step is computed, each within the one before
        self._completing = False  # what was left unread is read
        llm.engine.turn = self._turn if self._takes_turns else None
        self._thread = threading.Thread(target=self._work, name="slimrt computes", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue ``job``. Raises Busy, Stopping, and what ``Session.check`` raises for a prompt that cannot be read."""
        self._llm.current.check(job.ids)
        with self._condition:
            if self._closed:
                raise Stopping
            if len(self._waiting) >= self._most_waiting:
                raise Busy(len(self._waiting), max(1, round(len(self._waiting) * self._seconds)))
            self._waiting.append(job)
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the rest of ``job``."""
        with self._condition:
            job.cancelled = True
            self._condition.notify()

    def close(self) -> None:
        """Stop; jobs that have not ended fail."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()
        self._llm.engine.turn = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that idle sessions keep for prompts that begin as theirs."""
        with self._condition:
            return sum(session.kv_bytes for session in self._free)

    # -- the computing thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            idle: Session | None = None
            with self._condition:
                while not (self._waiting or self._running or self._closed):
                    idle = self._incomplete()
                    if not self._condition.wait(None if idle is None else _IDLE_S):
                        break
                if self._closed:
                    break
            if not (self._waiting or self._running) and idle is not None:
                self._complete(idle)
                continue
            self._start_next()
            self._read_together(self._running)
            for running in list(self._running):
                self._advance(running)
        for job in [*self._waiting, *(running.job for running in self._running)]:
            job.put(Failed(Stopping()))

    def _incomplete(self) -> Session | None:
        """The free session, last used, of whose prompt the layers behind a cut lack some. Passes of a GPU cannot be
        stopped for a request, and take little time."""
        long = (one for one in reversed(self._free) if one.incomplete and len(one.tokens) >= LEAST)
        return next(long, None) if self._takes_turns else None

    def _complete(self, session: Session) -> None:
        """Read what was left unread, as long as nobody asks; then the library, if there is one, gets all of it."""
        with self._condition:
            self._free.remove(session)
        self._completing = True
        try:
            count = session.complete(progress=lambda done, total: self._turn())
        except _Cancelled:
            count = 0
        except SlimrtError:
            log.exception("what a prompt's cuts left unread could not be read")
            session.release()
            count = 0
        finally:
            self._completing = False
            with self._condition:
                self._free.append(session)
        if count:
            log.info("a document of %d tokens was read whole, while nobody asked", count)
            session.keep(count, first_words(self._llm.tokenizer, session.tokens))

    def _start_next(self, longest: int | None = None) -> bool:
        """Begin the next job, if there is one, of at most ``longest`` tokens, and a session for it."""
        with self._condition:
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
            at = 0
            if longest is not None:
                at = next((i for i, job in enumerate(self._waiting) if len(job.ids) <= longest), len(self._waiting))
            if at >= len(self._waiting) or not (self._free or self._unmade):
                return False
            job = self._waiting[at]
            del self._waiting[at]
            session = self._session_for(job.ids)
            running = _Running(job, session)
            running.steps = answers(
                self._llm, session, job.ids, job.request, job.choices, self._told(job), job.came, running.draws
            )
            self._running.append(running)
        self._advance(running)
        return True

    def _session_for(self, ids: Sequence[int]) -> Session:
        """The free session that has read most of ``ids``; a new one where it would cost another conversation more than
        that, as long as there may be more; else the one that was used longest ago."""
        shared = [common_prefix(session.tokens, ids) for session in self._free]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is not None and (2 * shared[best] >= len(self._free[best].tokens) or not self._unmade):
            return self._free.pop(best if shared[best] else 0)
        self._unmade -= 1
        return Session(self._llm.engine, self._llm.ctx, self._llm.asking)

    def _advance(self, running: _Running) -> None:
        """One step of a job: all of its prompt, or one token."""
        if running.busy:
            return
        running.busy = True
        try:
            goes_on = not running.job.cancelled and self._step(running)
        finally:
            running.busy = False
        if not goes_on:
            running.steps.close()
            with self._condition:
                self._running.remove(running)
                self._free.append(running.session)

    def _read_together(self, streams: Sequence[_Running]) -> None:
        """Read what the next steps of ``streams`` need in few passes over the weights, each of several streams."""
        most, wanted = 0, []
        for running in streams:
            if running.drawing is None or running.job.cancelled:
                continue
            ids = running.drawing.next_tokens()
            if ids and not running.session.holds_ahead(ids):
                most = self._llm.engine.together
                wanted.append((running.session, ids))
        while len(wanted) > 1:
            size, some = 0, []
            while wanted and size + len(wanted[0][1]) <= most:
                size += len(wanted[0][1])
                some.append(wanted.pop(0))
            if len(some) < 2:
                wanted = wanted if some else wanted[1:]  # one that fills a pass reads alone
                continue
            try:
                Session.read_together(some)
            except SlimrtError:
                return  # whose it is shows when each reads for itself

    def _step(self, running: _Running) -> bool:
        """Whether more is to come."""
        job = running.job
        self._reading.append(job)
        try:
            event = next(running.steps, None)
        except _Cancelled:
            if not job.cancelled:
                job.put(Failed(Stopping()))
            return False
        except SlimrtError as error:
            event = Failed(error)
        except Exception as error:
            log.exception("a request failed")
            event = Failed(error)
        finally:
            self._reading.pop()
        if event is None:
            return False
        running.last = time.monotonic()
        if isinstance(event, Ended):
            self._seconds += 0.2 * (running.last - job.came - self._seconds)
            job.put(event)
            return self._step(running)  # what is left to do, though nobody waits for it: a client that is gone included
        job.put(event)
        return not isinstance(event, Failed)

    def _told(self, job: Job) -> Progress:
        """What happens behind each layer of a prompt."""

        def told(done: int, total: int) -> None:
            if job.progress:
                job.put(Progressed(done, total))
            self._turn()

        return told

    def _turn(self) -> None:
        """Between the parts of a prompt that is being read: others may go on."""
        # Another pass than a prompt's, or another thread's (texts become vectors elsewhere).
        if threading.current_thread() is not self._thread:
            return
        if self._completing and (self._waiting or self._closed):
            raise _Cancelled
        if not self._reading:
            return
        job = self._reading[-1]
        if job.cancelled or self._closed:
            raise _Cancelled
        if not self._takes_turns:
            return
        now = time.monotonic()
        waiting = [other for other in self._running if not other.busy and now - other.last > _TURN_S]
        self._read_together(waiting)
        for other in waiting:
            self._advance(other)
        if len(job.ids) > _SHORT:
            self._start_next(longest=_SHORT)
