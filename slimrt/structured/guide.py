"""Which tokens may come next: llguidance's parser over the trie of a model's vocabulary.

https://github.com/guidance-ai/llguidance (Earley's algorithm over derivatives of regular expressions). Its own limits
bound the time and the memory of compiling a grammar and of each mask.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np

from slimrt.errors import SettingError
from slimrt.structured.grammar import Grammar
from slimrt.text.tokenizer import Tokenizer

__all__ = ["Guide", "forget", "start"]

_KEPT = 16  # compiled grammars kept for each model: a server is asked for the same ones again and again
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
# One line and Python's separators: what is not needed is not drawn, and most of an object's frame is forced.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def start(grammar: Grammar, tokenizer: Tokenizer, vocab_size: int | None = None) -> Guide:
    """A guide at the beginning of an answer; ``vocab_size``: of the model's logits, if more than the tokenizer's.

    Raises SettingError for a grammar that does not compile, is not supported, exceeds the limits or matches nothing,
    and where llguidance is not installed.
    """
    with _LOCK:
        compiler = _COMPILERS.get(tokenizer)
        if compiler is None:
            compiler = _COMPILERS[tokenizer] = _Compiler(tokenizer)
        matcher = compiler.matcher(grammar)
    return Guide(matcher, grammar, vocab_size or tokenizer.vocab_size)


def forget(tokenizer: Tokenizer) -> None:
    """Compile what was compiled for ``tokenizer`` again when it is asked for: for measurements."""
    with _LOCK:
        if tokenizer in _COMPILERS:
            _COMPILERS[tokenizer].forget()


class Guide:
    """Follows one answer. ``vocab_size``: V of the logits."""

    def __init__(self, matcher: Any, grammar: Grammar, vocab_size: int) -> None:
        self._matcher, self._grammar, self._vocab_size = matcher, grammar, vocab_size
        self._taken = 0

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next; much cheaper than ``allowed``."""
        allowed = bool(self._matcher.validate_tokens([token]) == 1)
        self._check()
        return allowed

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: bool [V]; the ends of a text where the answer is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=min(8 * len(bits), self._vocab_size), bitorder="little").view(bool)
        if len(mask) == self._vocab_size:
            return mask
        return np.concatenate([mask, np.zeros(self._vocab_size - len(mask), bool)])

    def take(self, token: int) -> None:
        """``token`` comes next."""
        self._matcher.consume_token(token)
        self._taken += 1
        self._check()

    def valid(self, tokens: list[int]) -> int:
        """How many of ``tokens`` may come next, one after the other."""
        count = int(self._matcher.validate_tokens(tokens))
        self._check()
        return count

    def forced(self, most: int) -> list[int]:
        """The tokens that must come next, at most ``most``, already taken."""
        if most < 1:
            return []
        tokens = list(self._matcher.compute_ff_tokens()[:most])
        for token in tokens:
            self.take(token)
        return tokens

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def complete(self) -> bool:
        """Whether what was taken is an answer as a whole."""
        return bool(self._matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SettingError(
                f"the {self._grammar.kind} cannot be followed after {self._taken} tokens: "
                f"{_reason(self._matcher.get_error())}; simplify it"
            )


class _Compiler:
    """Grammars compiled for one vocabulary. What it holds must not hold the tokenizer, whose life it shares."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        library = _library()
        self._tokenizer = library.LLTokenizer(
            library.TokenizerWrapper(_Vocabulary(tokenizer)),
            n_vocab=tokenizer.vocab_size,
            eos_token=sorted(tokenizer.stop_ids) or None,
        )
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Any:
        """A matcher of its own at the beginning of ``grammar``."""
        made = self._kept.get(grammar)
        if made is None:
            made = self._compiled(grammar)
            while len(self._kept) >= _KEPT:
                self._kept.popitem(last=False)
            self._kept[grammar] = made
        self._kept.move_to_end(grammar)
        return made.deep_copy()

    def forget(self) -> None:
        """Let the compiled grammars go."""
        self._kept.clear()

    def _compiled(self, grammar: Grammar) -> Any:
        library = _library()
        try:
            limits = library.LLParserLimits(verbose_errors=False)
            matcher = library.LLMatcher(self._tokenizer, _source(grammar, library), log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # what nothing matches shows here, not when it is made
            error = matcher.get_error()
        except ValueError as problem:
            error = str(problem)
        if error:
            raise SettingError(f"{grammar.kind} {_excerpt(grammar)}: {_reason(error)}; change it")
        return matcher


class _Vocabulary:
    """The tokenizer as llguidance takes it: each token's bytes, which are control tokens, and text -> ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_id is None and not tokenizer.stop_ids:
            raise SettingError(
                "this model's vocabulary has no token that ends a text, which an answer in a form needs; use another"
            )
        self.eos_token_id = min(tokenizer.stop_ids) if tokenizer.eos_id is None else tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        ids = range(tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(id, special=True) for id in ids]
        self.special_token_ids = [id for id in ids if not tokenizer.is_text(id)]
        self._tokenizer = weakref.ref(tokenizer)

    def __call__(self, text: str | bytes) -> list[int]:
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "a guide is used with its model only"
        return tokenizer.encode_within(text.decode() if isinstance(text, bytes) else text)


_COMPILERS: weakref.WeakKeyDictionary[Tokenizer, _Compiler] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise SettingError(
            'schemas and grammars need the llguidance package: pip install "slimrt[structured]"'
        ) from error
    return llguidance


def _source(grammar: Grammar, library: Any) -> str:
    """``grammar`` in llguidance's own form. Raises ValueError."""
    matcher = library.LLMatcher
    if grammar.kind == "JSON schema":
        return str(matcher.grammar_from_json_schema(grammar.text, defaults=_JSON))
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.text))
    text = grammar.text
    if grammar.kind == "GBNF grammar":
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            text = gbnf_to_lark(_ESCAPE.sub(_unescaped, text))
        except Exception as error:  # the converter raises bare Exceptions
            raise ValueError(str(error)) from error
    return str(matcher.grammar_from_lark(text))


def _unescaped(match: re.Match[str]) -> str:
    """The converter to Lark spells \\u and \\U wrongly: they become \\x or the character itself."""
    digits = match[1] or match[2]
    if digits is None:
        return match[0]
    code = int(digits, 16)
    if code < 0x80:
        return f"\\x{code:02x}"
    if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
        raise ValueError(f"{match[0]} is no character")
    return chr(code)


def _reason(error: str) -> str:
    """llguidance's message on one line, without its dumps of state."""
    text = " ".join(error.split("<state>")[0].split())
    if text.startswith("NoExtension"):
        return "nothing can match it"
    # "at 1(8): invalid ... error: unclosed group 1 | start: ..." -> up to the quotation of the source.
    return re.split(r"\s\d+ \| ", text)[0][:300] or "unknown error"


def _excerpt(grammar: Grammar) -> str:
    text = " ".join(grammar.text.split())
    return text if len(text) <= 80 else f"{text[:80]}..."
