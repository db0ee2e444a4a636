"""Chat templates against Transformers and llama.cpp, malformed messages, and templates that mean harm."""

# ruff: noqa: E501  (templates in one line each)

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slimrt.errors import SettingError
from slimrt.text.chat_template import BUILTIN_TEMPLATES, ChatTemplate

GOLDENS = Path(__file__).parents[1] / "goldens/chat"
TRANSFORMERS = json.loads((GOLDENS / "transformers.json").read_text())
LLAMA_CPP = json.loads((GOLDENS / "llama_cpp.json").read_text())
TALK = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("name", TRANSFORMERS["templates"])
def test_real_templates_render_as_in_transformers(name: str) -> None:
    golden = TRANSFORMERS["templates"][name]
    template = ChatTemplate((GOLDENS / f"{name}.jinja").read_text(), golden["bos"], golden["eos"])
    for case in golden["cases"]:
        if "error" in case:
            with pytest.raises(SettingError, match=re.escape(case["error"])):
                template.render(case["messages"], **TRANSFORMERS["extra"])
        else:
            text = template.render(
                case["messages"], add_generation_prompt=case["add_generation_prompt"], **TRANSFORMERS["extra"]
            )
            assert text == case["text"]


@pytest.mark.parametrize("name", LLAMA_CPP["formats"])
def test_builtin_templates_render_as_in_llama_cpp(name: str) -> None:
    template = ChatTemplate(name, "", "<|endoftext|>" if name == "zephyr" else "</s>")
    for case in LLAMA_CPP["formats"][name]:
        messages = [{"role": role, "content": content} for role, content in case["messages"]]
        assert template.render(messages) == case["text"]


def test_llama2_renders_as_published() -> None:
    # https://huggingface.co/blog/llama2#how-to-prompt-llama-2
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    text = ChatTemplate("llama2", "<s>", "</s>").render(messages)
    assert text == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\none [/INST] two </s><s>[INST] three [/INST]"


def test_bos_comes_from_the_model() -> None:
    tokenizer: Any = SimpleNamespace(
        named_chat_templates={}, chat_template="{{ bos_token }}|{{ eos_token }}", bos_id=1, eos_id=None
    )
    tokenizer.token_text = {1: "<s>"}.__getitem__
    assert ChatTemplate.from_tokenizer(tokenizer).render(TALK) == "<s>|"
    assert ChatTemplate.from_tokenizer(tokenizer, "llama3").render(TALK).startswith("<s><|start_header_id|>user")


def test_a_missing_template_names_the_remedy() -> None:
    tokenizer: Any = SimpleNamespace(named_chat_templates={}, chat_template=None, bos_id=None, eos_id=None)
    with pytest.raises(SettingError, match=r"no chat template; .*--chat-template.*chatml"):
        ChatTemplate.from_tokenizer(tokenizer)


def test_text_parts_are_joined() -> None:
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": content}]) == "one\ntwo"


def test_messages_and_their_parts_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    before = json.dumps(messages)
    ChatTemplate("chatml").render(messages)
    assert json.dumps(messages) == before
    with pytest.raises(SettingError):
        ChatTemplate("{{ messages.append(1) }}").render(messages)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hello", "type str"),
        ({"role": "user", "content": "x"}, "type dict"),
        (None, "type NoneType"),
        ([], "empty"),
        (["Hello"], "message 0 is 'Hello'"),
        ([{"role": "user"}], "keys.*role.*'content' is missing"),
        ([{"content": "x"}], "role None"),
        ([{"role": 3, "content": "x"}], "role 3"),
        ([*TALK, {"role": "user", "content": 5}], "message 1 has content of type int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'; this model reads text only"),
        ([{"role": "user", "content": ["x"]}], "type 'str'"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words) as error:
        ChatTemplate("chatml").render(messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
def test_a_role_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(SettingError, match="refuses these messages: role wizard"):
        ChatTemplate(name).render([{"role": "wizard", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("gpt-5", "neither a Jinja template nor one of chatml, llama3"),
        ("{% for %}", "broken in line 1"),
        ("\n\n{{ x | nothing }}", "broken in line 3: No filter named 'nothing'"),
        ("{" + "{" * 5, "broken"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "does not compile|broken"),
        ("{% if x %}" * 200 + "{% endif %}" * 200, "does not compile"),
        ("{{ x }}" * 100_000, "700000 characters"),
        (None, "neither"),
    ],
)
def test_broken_templates_are_refused(source: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words) as error:
        ChatTemplate(source)
    assert "\n" not in str(error.value)


def test_every_builtin_has_a_name() -> None:
    assert all(ChatTemplate(name).name == name for name in BUILTIN_TEMPLATES)
    assert ChatTemplate(BUILTIN_TEMPLATES["chatml"]).name == ""


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': [1, 'é<'], 'a': none} | tojson }}", '{"b": [1, "é<"], "a": null}'),
        ("{{ {'b': 1} | tojson(indent=2) }}", '{\n  "b": 1\n}'),
        ("{% generation %}x{{ 1 }}{% endgeneration %}", "x1"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
         "013"),
        ("{% for i in [1, 2, 3] if i > 1 %}{{ loop.index }}{{ loop.last }}{{ loop.previtem }} {% endfor %}", "1False 2True2 "),
        ("{% macro m(a, b=2) %}{{ a }}-{{ b }}{% endmacro %}{{ m(1) }} {{ m(1, b='x') }}", "1-2 1-x"),
        ("{% for x in [[1, [2]], [3]] recursive %}({% if x is iterable %}{{ loop(x) }}{% else %}{{ x }}{% endif %})"
         "{% endfor %}", "((1)((2)))((3))"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}", "2"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x ~ 2 ~ none }}", "a12None"),
        ("{% filter upper %}abc{% endfilter %}", "ABC"),
        ("{{ '%s and %d' % ('x', 3) }} {{ '%05.1f' | format(2.5) }} {{ '{} {a!r:>4}'.format(1, a='y') }}", "x and 3 002.5 1  'y'"),
        ("{{ 'a.b'.split('.') | join('-') }} {{ '-'.join(['x', 'y']) }} {{ 'aXbX'.replace('X', '__', 1) }}", "a-b x-y a__bX"),
        ("{{ messages | map(attribute='role') | join(',') }} {{ messages | join('+', attribute='content') }}", "user Hello"),
        ("{% for m in messages %}{{ '{}'.format(m.content) }}{{ m.content.replace('l', 'L') }}{% endfor %}", "HelloHeLLo"),
        ("{{ [1, 2.5] | sum }} {{ [{'n': 2}] | sum(attribute='n') }} {{ 2.567 | round(1) }} {{ 'a\nb' | indent(2) }}", "3.5 2 2.6 a\n  b"),
        ("{{ [3, 1] | sort }} {{ {'k': 1}.items() | list }} {{ (1, 2)[::-1] }} {{ 2 ** 10 }} {{ 7 % 4 }} {{ 'ab' * 2 }}",
         "[1, 3] [('k', 1)] (2, 1) 1024 3 abab"),
        ("{{ missing }}|{{ messages[0].nothing is defined }}|{{ messages[-1]['content'] | length }}", "|False|5"),
    ],
)  # fmt: skip
def test_what_templates_may_do(source: str, text: str) -> None:
    assert ChatTemplate(source).render(TALK) == text


def test_the_date_is_todays() -> None:
    text = ChatTemplate("{{ strftime_now('%Y-%m') }}").render(TALK)
    assert text in (datetime.now().strftime("%Y-%m"), f"{datetime.now():%Y-%m}")


HARM = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "endless output": "{% for a in range(99999) %}{{ 'xxxxxxxxxx' }}" + "x" * 100_000 + "{% endfor %}",
    "output in a macro": "{% macro m() %}" + "x" * 100_000 + "{% endmacro %}{% for a in range(99999) %}{{ m() }}{% endfor %}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by set": "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "doubling by a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='ab') %}"
    "{% for a in range(64) %}{% set ns.x = m(ns.x) %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for a in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested dicts": "{% set ns = namespace(x=1) %}{% for a in range(64) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}"
    "{{ ns.x | tojson }}",
    "nested by dict()": "{% set ns = namespace(x=1) %}{% for a in range(64) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}",
    "repeat": "{{ 'a' * 10 ** 10 }}",
    "repeat a list": "{{ [1] * 10 ** 9 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set ns = namespace(x=99) %}{% for a in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "wide field": "{{ '%1000000000d' % 1 }}",
    "wide field of an argument": "{{ '%*d' % (1000000000, 1) }}",
    "wide format": "{{ '{:1000000000}'.format(1) }}",
    "wide format of an argument": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "many fields": "{% set x = 'x' * 1000000 %}{{ ('%s' * 1000) | format(x) }}",
    "many fields of one name": "{% set x = 'x' * 1000000 %}{{ ('%(x)s' * 1000) | format(x=x) }}",
    "many format fields": "{% set x = 'x' * 1000000 %}{{ ('{0}' * 1000).format(x) }}",
    "format_map": "{% set x = 'x' * 1000000 %}{{ ('{x}' * 1000).format_map({'x': x}) }}",
    "replace": "{% set x = 'x' * 1000000 %}{{ x.replace('x', x) }}",
    "replace filter": "{% set x = 'x' * 1000000 %}{{ x | replace('x', x) }}",
    "join": "{% set x = 'x' * 1000000 %}{{ x.join(range(99999) | map('string')) }}",
    "join filter": "{% set x = 'x' * 1000000 %}{{ range(99999) | join(x) }}",
    "indent": "{% set x = '\n' * 1000000 %}{{ x | indent(1000000) }}",
    "indent by text": "{% set x = '\n' * 1000000 %}{{ x | indent(x) }}",
    "tojson indent": "{{ [1] | tojson(indent=1000000000) }}",
    "round": "{{ 5 | round(1000000000, 'ceil') }}",
    "bad: sum of lists": "{{ range(99999) | map('list') | sum(start=[]) }}",
    "bad: justify": "{{ 'a'.ljust(1000000000) }}",
    "bad: bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "bad: expand tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "bad: unknown filter at run time": "{{ [1] | map('center', 1000000000) | list }}",
    "bad: lipsum": "{{ lipsum(n=1000000) }}",
    "bad: recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "bad: nested namespaces": "{% set ns = namespace(x=1) %}{% for a in range(64) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}"
    "{{ ns.x }}{{ undefined_thing() }}",
    "slow search": "{% set x = 'ab' * 4000000 %}{% for a in range(99999) %}{% if 'ba' * 900 + 'c' in x %}{% endif %}{% endfor %}",
    "slow sort": "{% set x = range(99999) | list %}{% for a in range(99999) %}{% set y = x | sort(reverse=true) %}{% endfor %}",
    "bad: escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "bad: globals": "{{ raise_exception.__globals__ }}{{ namespace.__init__.__globals__['os'] }}",
    "bad: include": "{% include '/etc/passwd' %}",
}  # fmt: skip


# What the budget does not see, or saw too late: the limits of the process end it.
ESCAPES = {
    "budget switched off": "{% set x=[-(10**15)]|map('budget:step')|list %}{{ ('a'*(6*10**9))|length }}",
    "shared attributes": "{% set n=namespace(x='a'*10000000) %}{{ ([n]*700)|map(attribute='x')|map('upper')|list|length }}",
    "sort by attribute": "{% set n=namespace(x='a'*10000000) %}{{ ([n]*700)|sort(attribute='x')|list|length }}",
    "group by attribute": "{% set n=namespace(x='a'*10000000) %}{{ ([n]*700)|groupby('x')|list|length }}",
    "indent of carriage returns": "{{ ('\r'*100000)|indent('x'*30000,blank=true) }}",
    "one list many times": "{{ ('%(a)s'*3000) % {'a': range(100000)|list} }}",
    "reverse search": "{{ ('a'*8000000).rfind('ab'+'a'*4000000) }}",
    "quadratic pattern": "{{ ('%(' * 120000) % 1 }}",
    "long division": "{{ (('f'*1600000)|int(0,16)) // (('f'*800000)|int(0,16)) }}",
    "search in each": "{{ ([n]*100000)|selectattr('x','in','a'*10000001)|list }}",
}  # fmt: skip
ESCAPES["search in each"] = "{% set n=namespace(x='a'*10000000) %}" + ESCAPES["search in each"]


@pytest.mark.parametrize("name", ESCAPES)
def test_templates_that_escape_their_budget_meet_a_limit(name: str) -> None:
    """In a process of their own each, whose children's memory and time the system counts."""
    script = (
        "import resource, sys, time; from slimrt.errors import SettingError\n"
        "from slimrt import ChatTemplate\n"
        "template = ChatTemplate(sys.argv[1])\n"
        "try: template.render([{'role': 'user', 'content': 'Hello'}])\n"
        "except SettingError as error: print(str(error))\n"
        "assert ChatTemplate('chatml').render([{'role': 'user', 'content': 'x'}])  # and the next one is served\n"
        "from slimrt.text import template_process; template_process._shared.close()\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime, used.ru_maxrss)"
    )
    command = [sys.executable, "-c", script, ESCAPES[name]]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stderr == ""
    message, used = run.stdout.splitlines()
    seconds, kib = map(float, used.split())
    assert "the chat template is stopped: " in message
    assert seconds < 6 and kib < 500_000


@pytest.mark.parametrize("name", HARM)
def test_harmful_templates_end_soon_and_small(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    with pytest.raises(SettingError) as error:
        ChatTemplate(HARM[name]).render(TALK)
    assert time.thread_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    if not name.startswith("bad:"):
        assert "stopped" in str(error.value)


def test_long_conversations_stay_within_the_budget() -> None:
    messages = [{"role": role, "content": "word " * 5000} for role in ("user", "assistant")] * 300  # 15 M characters
    for name in TRANSFORMERS["templates"]:
        golden = TRANSFORMERS["templates"][name]
        template = ChatTemplate((GOLDENS / f"{name}.jinja").read_text(), golden["bos"], golden["eos"])
        assert len(template.render(messages)) > 14_000_000
