"""A grammar for answers with calls: text is free up to a call, a call is whole and its arguments fit their schema.

llguidance's Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md): a lazy rule ends where a call's
trigger stands in the text, and from there on the grammar decides. Behind the calls an answer ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from slimrt.errors import SettingError
from slimrt.structured import guide as guides
from slimrt.structured.grammar import Grammar
from slimrt.text.tokenizer import Tokenizer
from slimrt.tools.formats import ARGS, ID, NAME, PARAMETERS, Format, parts
from slimrt.tools.parameters import is_plain_text, properties, words
from slimrt.tools.parser import THINK, THOUGHT, Thinking
from slimrt.tools.tool import Tool

__all__ = ["answer_grammar", "shown_tokens"]

_MOST_CALLS = 32  # of one answer: a model that repeats itself ends some time
_GUIDANCE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY = r"(.|\n)*"


def answer_grammar(
    form: Format, tools: Sequence[Tool], tokenizer: Tokenizer, *, required: bool = False, many: bool = True,
    thinking: Thinking = "no", answer: Grammar | None = None,
) -> Grammar:  # fmt: skip
    """What an answer may be: text with calls of ``tools`` behind it, or (``required``) calls; ``many``: more than one.
    ``answer``: a JSON schema; then it is calls, or in the place of text a value that is valid by it.

    Raises SettingError that names the tool where its schema is not supported or nothing fits it."""
    for tool in tools:
        if tool.arguments_schema().get("x-guidance"):
            raise SettingError(f"tool '{tool.name}': 'x-guidance' is the grammar's own key; leave it out")
    if answer is not None:
        guides.start(answer, tokenizer)  # what is wrong with it is not the tools'
    value = None if answer is None or required else json.loads(answer.text)
    grammar = Grammar.lark(_Lark(form, tools, tokenizer, many, thinking).text(required, value))
    try:
        guides.start(grammar, tokenizer)
    except SettingError as error:
        for tool in tools:
            try:
                guides.start(Grammar.json_schema(tool.arguments_schema()), tokenizer)
            except SettingError as problem:
                if str(problem) == str(error):  # nothing of the tool's, such as a package that is missing
                    raise
                raise SettingError(f"tool '{tool.name}': {problem}") from None
        raise SettingError(f"tools: {' '.join(str(error).split())[-200:]}") from None
    return grammar


def shown_tokens(form: Format, tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens of the form's spelling, which an answer's text must show to be read."""
    spelt = [form.begin, form.end, form.lead, *form.triggers, *(part for call in form.calls for part in parts(call))]
    return frozenset(id for text in spelt for id in tokenizer.split_control(text) if isinstance(id, int))


class _Lark:
    """The rules of one grammar."""

    def __init__(
        self, form: Format, tools: Sequence[Tool], tokenizer: Tokenizer, many: bool, thinking: Thinking
    ) -> None:
        self._form, self._tools, self._tokenizer = form, tools, tokenizer
        self._many = many and not form.single
        thoughts = [tokenizer.split_control(mark) for mark in (THINK, THOUGHT)]
        plain = all(isinstance(part, str) for mark in thoughts for part in mark)
        self._thinking: Thinking = thinking if plain else "no"
        self._rules = ["%llguidance {}"]
        self._made: set[str] = set()
        self._one: dict[str, str] = {}  # how a call begins -> its rule

    def text(self, required: bool, value: dict[str, Any] | None = None) -> str:
        """The grammar; ``value``: what answers without calls are bound to."""
        if required or value is not None:
            block = self._block(self._form.given, empty=False)
            if value is not None:
                mark = self._form.text_mark.removeprefix(self._form.given)
                schema = {**value, "x-guidance": {**_GUIDANCE, **value.get("x-guidance", {})}}
                self._rule("value", f"{self._literal(mark)} %json {json.dumps(schema)}")
                if not self._form.triggers:  # a call and a value begin alike: one lexer must tell them apart
                    block = " | ".join(self._whole_call(number, tool) for number, tool in enumerate(self._tools))
                block = f"(value | {block} | {self._literal(self._form.lead)} ({block}))"
            starts = {"no": block, "may": f"(thought BLANK?)? {block}", "open": f"thought BLANK? {block}"}
            self._rule("start", starts[self._thinking])
        elif self._thinking == "no":
            self._rule("start", self._begun())
        elif self._thinking == "open":  # an answer may end within its thoughts
            self._rule("start", f"TEXT | thought ({self._begun()})")
            self._rule("TEXT", f"/{_ANY}/")
        else:
            self._rule("start", f"({self._begun(THINK)}) | thought ({self._begun()})")
        if self._thinking != "no":
            begin = "" if self._thinking == "open" else _escaped(THINK)
            self._rule("thought[lazy]", f"/{begin}{_ANY}{_escaped(THOUGHT)}/")
            self._rule("BLANK", r"/[ \n]+/")
        return "\n".join(self._rules) + "\n"

    def _rule(self, name: str, body: str) -> str:
        if name not in self._made:
            self._made.add(name)
            self._rules.append(f"{name}: {body}")
        return name

    # -- text, and how calls begin in it -------------------------------------------------------------------------------

    def _begun(self, but: str = "") -> str:
        """Text or calls where an answer begins; text that does not begin with ``but``."""
        form = self._form
        if form.given:
            mark = json.dumps(form.text_mark.removeprefix(form.given))
            return f"{mark} ({self._within(but)}) | {self._block(form.given)}"
        if form.triggers:
            return self._within(but)
        heads = [part for call in form.calls for part in parts(call)[:1]]
        text = self._terminal("TEXT_NO_CALL", _not_beginning([head.rstrip(' "') for head in heads]))
        lead = f"{self._literal(form.lead)} {self._block('')} | " if form.lead else ""
        free = self._free(text)
        return f"{lead}{self._block('')} | {text}? | {f'{free} {self._any()}?' if free else text}"

    def _within(self, but: str) -> str:
        """Text, in the midst of which calls may begin; it does not begin with ``but``."""
        free = self._free(self._any())
        ways = self._ways(but)
        return " | ".join([*ways, f"{free} ({' | '.join(self._ways(''))})"] if free else ways)

    def _ways(self, but: str) -> list[str]:
        before = _not_beginning([but]) if but else _ANY
        text = self._terminal("TEXT_NO_THOUGHT", before) if but else self._any()
        ways = [f"{text}?"]
        for trigger in self._triggers():
            block = self._block(trigger)
            control = self._tokenizer.split_control(trigger)
            if len(control) == 1 and isinstance(control[0], int):
                ways.append(f"{text}? {self._literal(trigger)} {block}")
            else:
                head = f"head_{len(self._rules)}"
                self._rule(f"{head}[lazy]", f"/({before}){_escaped(trigger)}/")
                ways.append(f"{head} {block}")
        return ways

    def _triggers(self) -> list[str]:
        form = self._form
        if not form.named:
            return list(form.triggers)
        return [f"{trigger}{tool.name}\n" for trigger in form.triggers for tool in self._tools]

    def _any(self) -> str:
        return self._terminal("TEXT", _ANY)

    def _terminal(self, name: str, regex: str) -> str:
        return self._rule(name, f"/{regex}/")

    def _free(self, first: str) -> str:
        """Text, ``first`` at its beginning, with control tokens in it that have no part in calls, such as those around
        thoughts; "" for none."""
        own = shown_tokens(self._form, self._tokenizer) | self._tokenizer.stop_ids | {self._tokenizer.bos_id}
        ranges = _ranges(id for id in self._tokenizer.control_ids if id not in own)
        return self._rule("free", f"{first}? <[{ranges}]> ({self._any()}? <[{ranges}]>)*") if ranges else ""

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _block(self, begun: str, *, empty: bool = True) -> str:
        """The rule for all calls of an answer, whose first ``begun`` characters are there already."""
        form = self._form
        name = f"block_{len(self._rules)}"
        begin, first = form.begin[len(begun) :], begun[len(form.begin) :]
        if form.is_list:  # in which models are trained on several layouts
            gap = self._terminal("GAP", r"[ \n]{1,6}")
            opened = f'{self._literal(begin.removesuffix("["))} {gap}? "[" {gap}?'
            between, closed = f'"," {gap}?', f"{gap}? {self._literal(form.end)}"
        else:
            opened, between, closed = (self._literal(text) for text in (begin, form.separator, form.end))
        calls = self._one_of(first)
        if self._many:
            calls = f"{calls} ({between} {self._one_of('')}){{0,{_MOST_CALLS - 1}}}"
        if empty and form.is_list:
            calls = f"({calls})?"
        return self._rule(name, f"{opened} {calls} {closed}")

    def _one_of(self, begun: str) -> str:
        """The rule for one call, which begins with ``begun`` that is there already."""
        if begun in self._one:
            return self._one[begun]
        name = self._one[begun] = f"call_{len(self._one)}"
        ways = []
        for number, tool in enumerate(self._tools):
            for call in self._form.calls if begun or not self._form.triggers else self._form.calls[:1]:
                spelt = call.replace(NAME, tool.name)
                if spelt.startswith(begun):
                    ways.append(" ".join(self._slot(part, number, tool) for part in parts(spelt[len(begun) :])))
        return self._rule(name, " | ".join(ways))

    def _whole_call(self, number: int, tool: Tool) -> str:
        """The rule for a call that is one JSON object, by a schema of its own."""
        schema = tool.arguments_schema()
        whole: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        whole |= {"type": "object", "required": ["name", "parameters"], "additionalProperties": False}
        whole |= {"properties": {"name": {"const": tool.name}, "parameters": schema}, "x-guidance": _GUIDANCE}
        return self._rule(f"whole_{number}", f"%json {json.dumps(whole)}")

    def _slot(self, part: str, number: int, tool: Tool) -> str:
        if part == ARGS:
            schema = {**tool.arguments_schema(), "x-guidance": _GUIDANCE}
            return self._rule(f"arguments_{number}", f"%json {json.dumps(schema)}")
        if part == ID:
            return self._terminal("ID", self._form.id)
        if part == PARAMETERS:
            return self._elements(number, tool)
        return self._literal(part)

    def _elements(self, number: int, tool: Tool) -> str:
        rules = []
        for at, (name, schema, required) in enumerate(properties(tool)):
            begin = json.dumps(f"<parameter={name}>\n")
            rule = f"element_{number}_{at}"
            if is_plain_text(schema):
                self._rule(f"{rule}_text[lazy]", r"/(.|\n)*\n<\/parameter>/")
                self._rule(rule, f'{begin} {rule}_text "\\n"')
            elif words(schema):
                self._rule(rule, f'{begin} ({" | ".join(map(json.dumps, words(schema)))}) "\\n</parameter>\\n"')
            else:
                value = json.dumps({**schema, "x-guidance": _GUIDANCE})
                self._rule(f"{rule}_json", f"%json {value}")
                self._rule(rule, f'{begin} {rule}_json "\\n</parameter>\\n"')
            rules.append(rule if required else f"{rule}?")
        return self._rule(f"elements_{number}", " ".join(rules) or '""')

    def _literal(self, text: str) -> str:
        """``text`` as the model writes it: control tokens by their ids."""
        split = self._tokenizer.split_control(text) if text else []
        return " ".join(f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in split)


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", "\\/").replace("\n", "\\n")


def _not_beginning(heads: Iterable[str]) -> str:
    """A regular expression for texts that begin with none of ``heads``."""
    nexts: dict[str, set[str]] = {}  # beginning of a head -> characters that go on with it
    for head in heads:
        for at in range(len(head)):
            nexts.setdefault(head[:at], set()).add(head[at])
    ways = [""]
    for begin, chars in nexts.items():
        ways.append(_escaped(begin))
        other = "".join(sorted(_escaped(char) if char in "\\]^-/" else char for char in chars))
        ways.append(f"{_escaped(begin)}[^{other}]{_ANY}")
    return f"({'|'.join(ways)})"


def _ranges(ids: Iterable[int]) -> str:
    """Ids as llguidance lists them: 1-3,7."""
    runs: list[list[int]] = []
    for id in sorted(ids):
        if runs and id == runs[-1][1] + 1:
            runs[-1][1] = id
        else:
            runs.append([id, id])
    return ",".join(f"{low}-{high}" if low != high else str(low) for low, high in runs)
