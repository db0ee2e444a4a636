"""The forms in which models write calls, as data: how a call is spelt, and what in a chat template tells the form.

A call is a text with slots; whitespace in it is what a model is trained to write and is not needed to read a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimrt.results import ToolCall

__all__ = ["ARGS", "FORMATS", "GENERIC", "ID", "NAME", "PARAMETERS", "SMOLLM2", "Format", "formats_of", "parts"]

# Slots of a call: the tool's name, its arguments as a JSON object, an id, or arguments as XML-like elements.
NAME, ARGS, ID, PARAMETERS = "\x00", "\x01", "\x02", "\x03"
_SLOT = re.compile(f"([{NAME}{ARGS}{ID}{PARAMETERS}])")


@dataclass(frozen=True)
class Format:
    """``calls``: the spellings of one call, the usual one first. ``marks``: texts that are all in the template of a
    model that writes so. ``triggers``: the beginnings by which calls are told from text wherever they stand; without
    one a call is told only where the answer begins. ``lead``: a token that may go before such a call. ``begin``,
    ``separator``, ``end``: around and between the calls of an answer. ``given``: the beginning of a call that the
    prompt ends with already, ``text_mark``: what is written there before text. ``named``: only a tool's name makes the
    trigger one. ``single``: an answer has one call at most. ``id``: what an id matches. ``source``: where the form is
    written down."""

    name: str
    marks: tuple[str, ...]
    calls: tuple[str, ...]
    triggers: tuple[str, ...] = ()
    lead: str = ""
    begin: str = ""
    separator: str = ""
    end: str = ""
    given: str = ""
    text_mark: str = ""
    named: bool = False
    single: bool = False
    id: str = "[a-zA-Z0-9]{9}"
    source: str = ""

    def write(self, calls: Sequence[ToolCall]) -> str:
        """``calls`` as a model writes them."""
        return self.begin + self.separator.join(self._call(call) for call in calls) + self.end

    def _call(self, call: ToolCall) -> str:
        values = {NAME: call.name, ARGS: _dumped(json.loads(call.arguments)), ID: call.id}
        text = []
        for part in parts(self.calls[0]):
            if part == PARAMETERS:
                given = json.loads(call.arguments).items()
                text += [f"<parameter={key}>\n{_spelt(value)}\n</parameter>\n" for key, value in given]
            else:
                text.append(values.get(part, part))
        return "".join(text)

    @property
    def is_list(self) -> bool:
        """Whether the calls of an answer are one JSON list."""
        return self.begin.endswith("[")


def parts(call: str) -> list[str]:
    """A call's texts and slots, in order."""
    return [part for part in _SLOT.split(call) if part]


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _spelt(value: Any) -> str:
    return value if isinstance(value, str) else _dumped(value)


_OBJECT = f'{{"name": "{NAME}", "arguments": {ARGS}}}'
_CODER = f"<function={NAME}>\n{PARAMETERS}</function>\n</tool_call>"

GENERIC = Format(
    "hermes",
    ("<tool_call>",),
    (f"<tool_call>\n{_OBJECT}\n</tool_call>",),
    ("<tool_call>",),
    separator="\n",
    source="https://github.com/NousResearch/Hermes-Function-Calling",
)
SMOLLM2 = Format(
    "smollm2",
    ("named SmolLM, trained by Hugging Face<|im_end|>",),
    (_OBJECT,),
    ("<tool_call>",),
    begin="<tool_call>[",
    separator=", ",
    end="]</tool_call>",
    source="https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B-Instruct#function-calling",
)
FORMATS = (
    Format(
        "qwen3-coder",
        ("<function=", "<parameter=", "</tool_call>"),
        (f"<tool_call>\n{_CODER}", _CODER),  # some models leave the first line out
        ("<tool_call>", "<function="),
        separator="\n",
        source="https://huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct/blob/main/chat_template.jinja",
    ),
    Format(
        "functionary-3.1",
        ("<function=", "</function>"),
        (f"<function={NAME}>{ARGS}</function>",),
        ("<function=",),
        source="https://github.com/MeetKai/functionary/blob/main/tests/prompt_test_v3-llama3.1.txt",
    ),
    Format(
        "functionary-3.2",
        (">>>all\\n", "recipient"),
        (f">>>{NAME}\n{ARGS}",),
        (">>>",),
        given=">>>",
        text_mark=">>>all\n",
        named=True,
        source="https://github.com/MeetKai/functionary/blob/main/tests/prompt_test_v3.llama3.txt",
    ),
    Format(
        "granite-3",
        ("<|tool_call|>",),
        (_OBJECT,),
        ("<|tool_call|>",),
        begin="<|tool_call|>[",
        separator=", ",
        end="]",
        source="https://www.ibm.com/granite/docs/models/granite",
    ),
    Format(
        "mistral-id",
        ("[TOOL_CALLS]", "[CALL_ID]"),
        (f"[TOOL_CALLS]{NAME}[CALL_ID]{ID}[ARGS]{ARGS}", f"[TOOL_CALLS]{NAME}[ARGS]{ARGS}"),
        ("[TOOL_CALLS]",),
        source="https://docs.mistral.ai (tokenizer v11, Mistral Small 3.2)",
    ),
    Format(
        "mistral",
        ("[TOOL_CALLS]", "[ARGS]"),
        (f"[TOOL_CALLS]{NAME}[ARGS]{ARGS}",),
        ("[TOOL_CALLS]",),
        source="https://docs.mistral.ai (tokenizer v13, Devstral, Ministral 3)",
    ),
    Format(
        "mistral-list",
        ("[TOOL_CALLS]",),
        (f'{{"name": "{NAME}", "arguments": {ARGS}, "id": "{ID}"}}', _OBJECT),
        ("[TOOL_CALLS]",),
        begin="[TOOL_CALLS][",
        separator=", ",
        end="]",
        source="https://docs.mistral.ai (tokenizer v3 and v7, Mistral Nemo)",
    ),
    Format(
        "command-r7b",
        ("<|START_ACTION|>", "tool_call_id", "parameters"),
        (f'{{"tool_call_id": "{ID}", "tool_name": "{NAME}", "parameters": {ARGS}}}',),
        ("<|START_ACTION|>",),
        begin="<|START_ACTION|>[",
        separator=", ",
        end="]<|END_ACTION|>",
        id="[0-9]{1,3}",
        source="https://docs.cohere.com (Command R7B, prompt format)",
    ),
    GENERIC,
    Format(
        "llama-3",
        ('"parameters": ', "ipython"),
        (
            f'{{"name": "{NAME}", "parameters": {ARGS}}}',
            f'{{"type": "function", "name": "{NAME}", "parameters": {ARGS}}}',
        ),
        lead="<|python_tag|>",
        single=True,
        source="https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling",
    ),
)


def formats_of(template: str) -> list[Format]:
    """The forms that a chat template's source may tell, the likeliest first."""
    return [form for form in FORMATS if all(mark in template for mark in form.marks)]
