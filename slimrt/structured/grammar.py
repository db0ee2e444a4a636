"""What an answer must match, in one of the languages that people write it in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slimrt.errors import SettingError
from slimrt.structured import closing
from slimrt.structured.plain import plain
from slimrt.structured.termination import ends

__all__ = ["Grammar", "Schema", "grammar_of", "response_grammar"]

Kind = Literal["JSON schema", "regex", "Lark grammar", "GBNF grammar"]
Schema = Mapping[str, Any] | bool | str

MAX_BYTES = 1 << 20  # of a grammar's text: more is refused before anything is compiled
_GBNF = re.compile(r"(?m)^\s*[\w-]+\s*::=")
_LARK = re.compile(r"(?m)^\s*start\s*:")


@dataclass(frozen=True)
class Grammar:
    """What an answer must match: ``Grammar.json_schema``, ``json_object``, ``regex``, ``lark``, ``gbnf``.

    Making one checks its form alone; it is compiled, and refused where nothing can match it or the library does not
    support it, when an answer is asked for, before the prompt is read.
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise SettingError(f"{self.kind} {self.text!r}: must be a text that is not blank")
        size = len(self.text.encode(errors="replace"))
        if size > MAX_BYTES:
            raise SettingError(
                f"the {self.kind} has {size:,} bytes, at most {MAX_BYTES:,} are taken; shorten it, "
                "for example a long enum to a pattern"
            )

    @classmethod
    def json_schema(cls, schema: Schema, *, closed: bool = True) -> Grammar:
        """JSON that is valid by ``schema``: a dict, a bool or JSON text.

        ``closed``: an object that lists its properties gets no others, unless the schema says that it may
        (``additionalProperties``); without it whatever is valid may be written, and a model that may go on often does.

        The answer is on one line, with ", " and ": " as separators and properties in the schema's order, unless the
        schema says otherwise under "x-guidance" (llguidance's options, such as {"whitespace_flexible": true}).
        Keywords: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md; others are refused.
        Raises SettingError for what is no schema, and where it can only be met by an answer without end.
        """
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            if isinstance(value, Mapping):
                value = closing.closed(plain(value)) if closed else plain(value)
            text = json.dumps({} if value is True else value, ensure_ascii=False)
        except SettingError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise SettingError(f"schema {_short(schema)}: must be JSON: {_line(error)}") from None
        if value is False:
            raise SettingError("schema false: nothing is valid by it; leave it out, or give a schema")
        if not isinstance(value, (Mapping, bool)):
            raise SettingError(f"schema {_short(value)}: must be an object, such as {{'type': 'object'}}")
        if len(text) <= MAX_BYTES and isinstance(value, Mapping) and not ends(value):
            raise SettingError(
                f"schema {_short(value)}: it requires itself within itself, so that an answer would have no end; "
                "make the recursive property optional, or let it be null too"
            )
        return cls("JSON schema", text)

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls("JSON schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that ``pattern`` matches as a whole; syntax of Rust's ``regex``, without look-around."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A Lark grammar whose rule is ``start``: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md"""
        return cls("Lark grammar", text)

    @classmethod
    def gbnf(cls, text: str) -> Grammar:
        """llama.cpp's GBNF, whose rule is ``root``."""
        return cls("GBNF grammar", text)

    @classmethod
    def detect(cls, text: str) -> Grammar:
        """GBNF or Lark, told apart by how rules are written. Raises SettingError for neither."""
        if isinstance(text, str):
            if _GBNF.search(text):
                return cls.gbnf(text)
            if _LARK.search(text):
                return cls.lark(text)
        raise SettingError(
            f"grammar {_short(text)}: must be GBNF (root ::= ...) or Lark (start: ...); a JSON schema goes into "
            "schema=, a regular expression into Grammar.regex"
        )


def grammar_of(schema: Schema | None, grammar: Grammar | str | None) -> Grammar | None:
    """The options ``schema`` and ``grammar`` as one; None for neither. Raises SettingError for both."""
    if schema is not None and grammar is not None:
        raise SettingError("schema and grammar: an answer can be bound to one of them; leave the other out")
    if schema is not None:
        return Grammar.json_schema(schema)
    return grammar if grammar is None or isinstance(grammar, Grammar) else Grammar.detect(grammar)


def response_grammar(response_format: Mapping[str, Any] | None) -> Grammar | None:
    """OpenAI's ``response_format`` (and llama_cpp's, with "schema" beside "json_object"); None for plain text."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")
        return Grammar.json_object() if schema is None else Grammar.json_schema(schema)
    if kind == "json_schema":
        named = response_format.get("json_schema")
        if isinstance(named, Mapping) and "schema" in named:
            return Grammar.json_schema(named["schema"])
        raise SettingError(
            f"response_format {_short(response_format)}: must hold the schema as "
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        )
    raise SettingError(
        f"response_format {_short(response_format)}: its type must be 'text', 'json_object' or 'json_schema'"
    )


def _short(value: object) -> str:
    try:
        text = " ".join((value if isinstance(value, str) else repr(value)[:200]).split())
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply"
    return repr(text if len(text) <= 80 else text[:80] + "...") if isinstance(value, str) else text[:80]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
