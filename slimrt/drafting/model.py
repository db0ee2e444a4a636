"""A small model of the same vocabulary guesses what the large one will write (arXiv 2211.17192)."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence

from slimrt.drafting.pace import Costs, best_count
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.reuse import common_prefix
from slimrt.session import Session
from slimrt.text.tokenizer import Tokenizer

__all__ = ["DraftModel", "check_vocabulary"]

_FILLED_UP = 1024  # entries without use by which vocabularies of one family differ in length
_PIECE = 64  # tokens that the small model may be behind before it reads them as a prompt
_PRIOR, _WEIGHT, _MEMORY = 0.7, 4.0, 64.0  # that a guess is right, before any was seen; see lookup
_PAUSE = 64  # tokens without guesses after which a model that did not pay is tried again


class DraftModel:
    """The small model, on an engine of its own, with a conversation for each session that it guesses for."""

    def __init__(self, engine: Engine, ctx: int, name: str = "") -> None:
        """``ctx``: tokens up to which it guesses; ``name``: for messages."""
        self.engine, self.ctx, self.name = engine, ctx, name
        self._sessions: weakref.WeakKeyDictionary[Session, Session] = weakref.WeakKeyDictionary()

    def __str__(self) -> str:
        return f"model {self.name}"

    def follow(self, session: Session) -> _Following:
        """Guesses for the text that begins behind what ``session`` has read."""
        own = self._sessions.get(session)
        if own is None:
            own = self._sessions[session] = Session(self.engine, self.ctx)
        return _Following(own, session.tokens, session.engine.config.vocab_size)


class _Following:
    """Guesses for one text."""

    def __init__(self, session: Session, tokens: Sequence[int], vocab_size: int) -> None:
        self._session, self._text, self._vocab_size = session, list(tokens), vocab_size
        self._sure = common_prefix(session.tokens, self._text)  # tokens that the session has in common with the text
        self._guessed: list[int] = []
        self._right, self._seen = _PRIOR * _WEIGHT, _WEIGHT
        self._waited = 0

    def guess(self, most: int, costs: Costs) -> list[int]:
        """The next tokens by the small model's likeliest choice, as many as pay, at most ``most``."""
        chance = self._right / self._seen
        count = best_count([chance**number for number in range(1, most + 1)], costs)
        if not count and self._waited >= _PAUSE:
            count = min(most, 2)
        if not count or len(self._text) + count > self._session.ctx:
            self._waited += 1
            return []
        self._waited = 0
        begun = time.perf_counter()
        with self._session.lock:
            self._catch_up()
            guesses: list[int] = []
            while True:
                assert self._session.logits is not None
                token = int(self._session.logits.argmax())
                if token >= self._vocab_size:
                    break
                guesses.append(token)
                if len(guesses) == count:
                    break
                self._session.decode([token])
        self._guessed = guesses
        costs.note_guess((time.perf_counter() - begun) / count)
        return guesses

    def wrote(self, tokens: list[int]) -> None:
        """``tokens`` came next."""
        for token, guess in zip(tokens, self._guessed, strict=False):
            fade = min(1.0, _MEMORY / (self._seen + 1))
            self._right, self._seen = (self._right + (token == guess)) * fade, (self._seen + 1) * fade
            if token != guess:
                break
        self._guessed = []
        self._text += tokens

    def _catch_up(self) -> None:
        """Make the small model's conversation the text so far."""
        session, text = self._session, self._text
        at = min(self._sure, len(session.tokens))
        while at < min(len(session.tokens), len(text)) and session.tokens[at] == text[at]:
            at += 1
        at = min(at, len(text) - 1)  # the last token is read for its logits
        if len(text) - at > _PIECE:
            session.prefill(text)
        else:
            if at < len(session.tokens):
                session.truncate(at)
            session.decode(text[at:])
        self._sure = len(text)


def check_vocabulary(own: Tokenizer, draft: Tokenizer, name: str) -> None:
    """Raise SettingError unless the tokens of the draft model are those of the model."""
    sizes = own.vocab_size, draft.vocab_size
    if abs(sizes[0] - sizes[1]) > _FILLED_UP:
        raise SettingError(
            f"draft model {name}: its vocabulary has {sizes[1]} tokens, the model's {sizes[0]}; "
            "use a smaller model of the same family"
        )
    for id in range(min(sizes)):
        if own.token_bytes(id, special=True) != draft.token_bytes(id, special=True):
            raise SettingError(
                f"draft model {name}: token {id} is {draft.token_text(id)!r}, the model's is {own.token_text(id)!r}; "
                "use a smaller model of the same family"
            )
