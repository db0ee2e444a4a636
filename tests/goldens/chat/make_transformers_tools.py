"""What Transformers' ``apply_chat_template`` writes for the templates of more families: tools, documents, thinking.

Made with transformers 5.24, tokenizers 0.23, from the folder ``models/templates`` of llama.cpp:

    python tests/goldens/chat/make_transformers_tools.py TEMPLATES

writes the templates and ``transformers_tools.json`` beside this script. Of each text the golden has the length and the
first half of its SHA-256. All other templates of that folder (70) were compared the same way, and are left out for
their length. ``strftime_now`` is a macro here, so that the texts do not change with the day.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

HERE = Path(__file__).parent
TEMPLATES = {
    "qwen3": "Qwen-Qwen3-0.6B.jinja",
    "smollm3": "HuggingFaceTB-SmolLM3-3B.jinja",
    "granite-3.3": "ibm-granite-granite-3.3-2B-Instruct.jinja",
    "granite-4.0": "ibm-granite-granite-4.0.jinja",
    "ministral-3": "mistralai-Ministral-3-14B-Reasoning-2512.jinja",
    "gpt-oss": "openai-gpt-oss-120b.jinja",
    "command-r7b": "CohereForAI-c4ai-command-r7b-12-2024-tool_use.jinja",
    "llama-3.1": "meta-llama-Llama-3.1-8B-Instruct.jinja",
    "deepseek-v3.1": "deepseek-ai-DeepSeek-V3.1.jinja",
    "llama-3.2": "meta-llama-Llama-3.2-3B-Instruct.jinja",
    "qwen2.5": "Qwen-Qwen2.5-7B-Instruct.jinja",
    "qwen3-coder": "Qwen3-Coder.jinja",
    "mistral-nemo": "mistralai-Mistral-Nemo-Instruct-2407.jinja",
    "mistral-small-3.2": "Mistral-Small-3.2-24B-Instruct-2506.jinja",
    "functionary-3.1": "meetkai-functionary-medium-v3.1.jinja",
    "functionary-3.2": "meetkai-functionary-medium-v3.2.jinja",
    "hermes-2-pro": "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use.jinja",
}
DAY = "{% macro strftime_now(format) %}2025-01-02{% endmacro %}"
BOS, EOS = "<s>", "</s>"


def tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def calls(content: str | None, *made: tuple[str, Any]) -> dict[str, Any]:
    listed = [
        {"id": f"abcdefgh{at}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for at, (name, arguments) in enumerate(made)
    ]
    return {"role": "assistant", "content": content, "tool_calls": listed}


def result(at: int, name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"abcdefgh{at}", "name": name, "content": content}


TOOLS = [
    tool(
        "get_weather",
        'Weather of a city, "now" & <b>',
        {
            "city": {"type": "string", "description": "Where"},
            "unit": {"type": "string", "enum": ["c", "f"]},
            "days": {"type": "array", "items": {"type": "integer"}},
        },
        ["city"],
    ),
    tool("add", "Sum", {"a": {"type": "number"}, "b": {"type": "number"}}, ["a", "b"]),
]
DOCUMENTS = [
    {"title": "One", "text": "First <doc>", "content": "First"},
    {"title": "Two", "text": "Second", "content": "Second"},
]
SYSTEM = {"role": "system", "content": "You are  terse.\n"}
USER = {"role": "user", "content": "  Où est la bibliothèque? 図書館 <|im_end|>\n"}
ANSWER = {"role": "assistant", "content": "<think>hm</think> Là-bas. "}
MORE = {"role": "user", "content": "{{ 7 * 7 }} & <b>"}
PLACE = {"city": "Zürich", "days": [1, 2]}
WEATHER, SUM = result(0, "get_weather", '{"t": 21}'), result(1, "add", "3.5")
BOTH = calls(None, ("get_weather", PLACE), ("add", {"a": 1, "b": 2.5}))
LATE = {"role": "assistant", "content": "21"}

CASES: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([USER], {}),
    ([SYSTEM, USER, ANSWER, MORE], {}),
    ([USER, USER], {}),
    ([{"role": "wizard", "content": "x"}], {}),
    ([USER], {"tools": TOOLS}),
    ([SYSTEM, USER, calls("", ("get_weather", PLACE)), WEATHER], {"tools": TOOLS}),
    ([USER, calls("", ("get_weather", json.dumps(PLACE))), WEATHER], {"tools": TOOLS}),
    ([SYSTEM, USER, BOTH, WEATHER, SUM, LATE, MORE], {"tools": TOOLS}),
    ([USER, calls("", ("get_weather", PLACE)), WEATHER, LATE, MORE], {}),
    ([SYSTEM, USER], {"documents": DOCUMENTS}),
    ([SYSTEM, USER], {"documents": DOCUMENTS, "tools": TOOLS}),
    ([SYSTEM, USER, ANSWER, MORE], {"enable_thinking": False}),
    ([USER], {"enable_thinking": True, "thinking": True}),
    ([SYSTEM, USER], {"reasoning_effort": "high"}),
]


def digest(text: str) -> list[Any]:
    return [len(text), hashlib.sha256(text.encode()).hexdigest()[:32]]


def cases(template: str) -> list[Any]:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"x": 0}, "x")), bos_token=BOS, eos_token=EOS
    )
    results: list[Any] = []
    for messages, extra in CASES:
        for prompt in (True, False):
            try:
                text = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **extra
                )
                results.append(digest(text))
            except Exception as error:
                results.append(str(error))
    return results


def main(folder: Path) -> None:
    golden: dict[str, Any] = {"transformers": transformers.__version__, "day": DAY, "bos": BOS, "eos": EOS}
    golden["cases"] = [{"messages": messages, "extra": extra} for messages, extra in CASES]
    golden["templates"] = {}
    for name, file in TEMPLATES.items():
        source = (folder / file).read_text()
        (HERE / f"{name}.jinja").write_text(source)
        golden["templates"][name] = cases(DAY + source)
    out = HERE / "transformers_tools.json"
    out.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")
    print(out, out.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
