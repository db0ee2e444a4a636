"""Tools, calls and results in a prompt: by the model's own template, and where it has no place for them, as text.

What a template can do is tried out, as llama.cpp does it: it renders a conversation with a word that must come out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimrt.errors import SettingError
from slimrt.results import ToolCall
from slimrt.text.chat_template import ChatTemplate, Written
from slimrt.text.tokenizer import Tokenizer
from slimrt.tools.formats import GENERIC, SMOLLM2, Format, formats_of
from slimrt.tools.parser import THINK, THOUGHT, Answer, CallParser, Thinking, call_id
from slimrt.tools.tool import Tool

__all__ = ["ToolForm", "has_calls"]

Message = Mapping[str, Any]

_WORD, _RESULT = "zqtoolqz", "zqresultqz"
_USER = {"role": "user", "content": "Hi"}
_ANSWER = {"role": "assistant", "content": "Hi"}
_NINE = re.compile("[a-zA-Z0-9]{9}")
_CALLS = (
    "For each call write a JSON object with the tool's name and its arguments within <tool_call></tool_call> tags:\n"
)
_EXAMPLE = '<tool_call>\n{"name": <tool name>, "arguments": <object of arguments>}\n</tool_call>'
# Of templates that know nothing of tools: the words of Hermes' format, which most models have met.
_INSTRUCTIONS = (
    "# Tools\n\nYou may call one or more tools to assist with the user's request. "
    "The tools are described within <tools></tools> tags:\n<tools>\n{tools}\n</tools>\n\n" + _CALLS + _EXAMPLE
)
# SmolLM2's are those that it was trained with (its model card, and Ollama's template for it).
_SMOLLM2 = (
    "You are an expert in composing functions. You are given a question and a set of possible functions.\n"
    "Based on the question, you will need to make one or more function/tool calls to achieve the purpose.\n"
    "If none of the functions can be used, point it out and refuse to answer.\n"
    "If the given question lacks the parameters required by the function, also point it out.\n\n"
    "You have access to the following tools:\n<tools>{tools}</tools>\n\n"
    "The output MUST strictly adhere to the following format, and NO other text MUST be included.\n"
    "The example format is as follows. Please make sure the parameter type is correct. "
    "If no function call is needed, please make the tool calls an empty list '[]'.\n"
    '<tool_call>[\n{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": "value2"}},\n'
    "... (more tool calls as required)\n]</tool_call>"
)


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether a conversation holds calls or results of tools."""
    return any(
        isinstance(message, Mapping)
        and (message.get("tool_calls") or message.get("function_call") or message.get("role") in ("tool", "function"))
        for message in messages
    )


@dataclass(frozen=True)
class ToolForm:
    """How one model has tools and calls. ``native``: the template has a place for tools; ``arguments``: how it takes
    the arguments of calls in messages, "object" or "text", "" where it has no place for calls; ``empty``: whether it
    wants a content beside calls; ``results``: whether it has a place for the role tool; ``system``: for the role
    system; ``many``: for several calls in one message; ``thinking``: whether answers may begin with thoughts, or the
    prompt begins one; ``nine``: whether ids must have nine letters and digits."""

    format: Format
    native: bool
    arguments: str
    empty: bool
    results: bool
    system: bool
    many: bool
    thinking: Thinking
    nine: bool

    @classmethod
    def of(cls, template: ChatTemplate) -> ToolForm:
        """The form of a template's model: one that the template itself writes calls in, or does not contradict."""
        source = template.for_tools.source
        tool = Tool(_WORD, "", {"type": "object", "properties": {}})
        given = {"tools": [tool.as_openai()]}
        prompt = _tried(template, [_USER], **given)
        native, arguments, empty, form = False, "", False, GENERIC
        for candidate in formats_of(source) if _WORD in prompt else []:
            found = _written(template, candidate, tool, prompt)
            if found is not None:
                native, form, (arguments, empty) = True, candidate, found
                break
        if not native:
            given = {}
            form = SMOLLM2 if all(mark in source for mark in SMOLLM2.marks) else GENERIC
        call = _openai("abcdefgh1", _WORD, {} if arguments == "object" else "{}")
        made = {"role": "assistant", "content": "", "tool_calls": [call]} if arguments else _ANSWER
        answer = {"role": "tool", "content": _RESULT, "tool_call_id": "abcdefgh1", "name": _WORD}
        both = {**made, "tool_calls": [call, {**call, "id": "abcdefgh2"}]}
        return cls(
            form,
            native,
            arguments,
            empty,
            native and _RESULT in _tried(template, [_USER, made, answer], **given),
            _RESULT in _tried(template, [{"role": "system", "content": _RESULT}, _USER]),
            not arguments or bool(_tried(template, [_USER, both], **given)),
            "open" if prompt.rstrip().endswith(THINK) else "may" if THOUGHT in source else "no",
            "!= 9" in source,
        )

    def prompt(
        self, template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> list[int]:
        """The token ids of a conversation with calls and results, and with ``tools`` that the answer may use.

        Raises SettingError as ``ChatTemplate.tokens`` does, and for calls that are none."""
        prepared = self._messages(messages, tokenizer)
        if not tools:
            return template.tokens(prepared, tokenizer)
        listed = [tool.as_openai() for tool in tools]
        if self.native:
            return template.tokens(prepared, tokenizer, tools=listed)
        return template.tokens(self._instructed(prepared, listed), tokenizer)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _messages(self, messages: Sequence[Any], tokenizer: Tokenizer) -> list[dict[str, Any]]:
        names: dict[str, str] = {}  # ids of calls -> what was called
        prepared: list[dict[str, Any]] = []
        for at, message in enumerate(messages):
            if not isinstance(message, Mapping):
                return list(messages)  # refused by the template's own check
            turn = dict(message)
            function = turn.pop("function_call", None)
            if function is not None and not turn.get("tool_calls"):
                turn["tool_calls"] = [{"function": function}]
            if turn.get("role") == "function":
                turn["role"] = "tool"
            if turn.get("role") == "tool":
                self._result(turn, names)
                if not self.results:
                    text = f"<tool_response>\n{_text(turn.get('content'))}\n</tool_response>"
                    if prepared and prepared[-1].get("responses"):
                        prepared[-1]["content"] += f"\n{text}"
                    else:
                        prepared.append({"role": "user", "content": text, "responses": True})
                    continue
            elif turn.get("tool_calls"):
                calls = [_checked(at, call) for call in _listed(at, turn["tool_calls"])]
                names |= {call.id: call.name for call in calls}
                self._called(turn, calls, tokenizer)
            else:
                turn.pop("tool_calls", None)
            prepared.append(turn)
        return [{key: value for key, value in turn.items() if key != "responses"} for turn in prepared]

    def _result(self, turn: dict[str, Any], names: Mapping[str, str]) -> None:
        id = turn.get("tool_call_id")
        if id is None and names:
            id = list(names)[-1]
        if id is not None:
            turn["tool_call_id"] = self._id(str(id))
            turn.setdefault("name", names.get(str(id), ""))

    def _called(self, turn: dict[str, Any], calls: list[ToolCall], tokenizer: Tokenizer) -> None:
        if not self.arguments:
            del turn["tool_calls"]
            text = _text(turn.get("content"))
            written = self.format.write(calls)
            turn["content"] = Written(
                [(f"{text}\n" if text else "", False), *_trusted(written, calls, self.format, tokenizer)]
            )
            return
        turn["tool_calls"] = [
            _openai(
                self._id(call.id), call.name,
                json.loads(call.arguments) if self.arguments == "object" else call.arguments,
            )
            for call in calls
        ]  # fmt: skip
        if self.empty and turn.get("content") is None:
            turn["content"] = ""

    def _id(self, id: str) -> str:
        """An id that the template takes: some want nine letters and digits, which other providers' are not."""
        if not self.nine or _NINE.fullmatch(id):
            return id
        return hashlib.sha256(id.encode(errors="replace")).hexdigest()[:9]

    def _instructed(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``messages`` with the tools in the system message, or where the template has none, in the user's first."""
        if self.format is SMOLLM2:
            text = _SMOLLM2.replace("{tools}", json.dumps(tools, ensure_ascii=False))
        else:
            listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            text = _INSTRUCTIONS.replace("{tools}", listed)
        first = next((at for at, turn in enumerate(messages) if turn.get("role") in ("system", "user")), None)
        system = first == 0 and messages[0].get("role") == "system"
        if self.system and not system:
            return [{"role": "system", "content": text}, *messages]
        if first is None:
            raise SettingError("tools: this model takes them in the user's message, and there is none; begin with one")
        own = _text(messages[first].get("content"))
        content = f"{own}\n\n{text}" if system else f"{text}\n\n{own}"
        return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def _trusted(written: str, calls: list[ToolCall], form: Format, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of calls in pieces: the form's own control tokens count, those spelt in arguments are text."""
    controls = {text for part in (form.begin, form.end) for text in _controls(part, tokenizer)}
    pieces: list[tuple[str, bool]] = []
    begin = next((text for text in controls if written.startswith(text)), "")
    end = next((text for text in controls if written.endswith(text) and len(written) > len(begin)), "")
    middle = written[len(begin) : len(written) - len(end)]
    pieces += [(begin, True), (middle, False), (end, True)]
    return [piece for piece in pieces if piece[0]]


def _controls(text: str, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token_text(part) for part in tokenizer.split_control(text) if isinstance(part, int)]


def _written(template: ChatTemplate, form: Format, tool: Tool, prompt: str) -> tuple[str, bool] | None:
    """How the template takes the arguments of calls, and whether they need a content beside them, where it writes calls
    in ``form``; ("", False) where it writes none; None where it writes them in another form."""
    other, thoughtless = False, prompt.rstrip().removesuffix(THINK).rstrip()
    for kind, arguments in (("object", {_WORD: 1}), ("text", json.dumps({_WORD: 1}))):
        for content in (None, ""):
            turn = {"role": "assistant", "content": content, "tool_calls": [_openai("abcdefgh1", _WORD, arguments)]}
            text = _tried(template, [_USER, turn], tools=[tool.as_openai()], add_generation_prompt=False)
            written = next((text[len(begin) :] for begin in (prompt, thoughtless) if text.startswith(begin)), text)
            reader, answer = CallParser(form, [tool], "may"), Answer()
            answer.take(reader.push(written) + reader.finish())
            if [json.loads(call.arguments) for call in answer.calls] == [{_WORD: 1}]:
                return kind, content == ""
            other = other or _WORD in written
    return None if other else ("", False)


def _tried(template: ChatTemplate, messages: list[dict[str, Any]], **extra: Any) -> str:
    """What the template makes of ``messages``; nothing where it refuses them or fails."""
    try:
        return template.render(messages, **extra)
    except SettingError:
        return ""


def _openai(id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else ()
    return "\n".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))


def _listed(at: int, calls: Any) -> Sequence[Any]:
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise SettingError(f"message {at}: its tool_calls are of type {type(calls).__name__}; they must be a list")
    return calls


def _checked(at: int, call: Any) -> ToolCall:
    """A call in a message as OpenAI has it; its arguments may be an object too."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(name, str) or not name:
        raise SettingError(
            f"message {at}: a tool call is {' '.join(repr(call).split())[:80]}; it must be an object such as "
            '{"id": ..., "function": {"name": ..., "arguments": "{...}"}}'
        )
    given = inner.get("arguments", {})
    try:
        arguments = json.loads(given or "{}") if isinstance(given, str) else given
        text = given if isinstance(given, str) and given else json.dumps(arguments, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        arguments, text = None, ""
    if not isinstance(arguments, Mapping):
        raise SettingError(
            f"message {at}: the arguments of a call of '{name[:80]}' are no JSON object; leave out calls that were cut"
        )
    id = call.get("id")
    return ToolCall(id if isinstance(id, str) and id else call_id(), name, text)
