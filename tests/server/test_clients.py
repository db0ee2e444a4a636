"""``slimrt serve`` as it is run, a process that listens, with the clients that people have and with those they fear."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import inspect
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

import slimrt
from scripts.crowd import soak
from slimrt.server.anthropic import COUNT
from slimrt.server.anthropic import MESSAGES as MESSAGE_FIELDS
from slimrt.server.embeddings import EMBEDDINGS
from slimrt.server.openai import CHAT, COMPLETION
from slimrt.server.responses import RESPONSES
from tests.tiny_gguf import write_tiny_llama

MESSAGES: list[Any] = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def openai() -> Any:
    """Imported by the worker that needs it: it takes seconds."""
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def anthropic() -> Any:
    return pytest.importorskip("anthropic")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_layers=4, ctx=2048)


@pytest.fixture(scope="module")
def llm(model: Path) -> slimrt.LLM:
    return slimrt.load(model, device="numpy", prune="off", threads=1)


def started(model: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """A server and its address, which it says when it listens."""
    command = [sys.executable, "-m", "click_cli", "serve", "--model", str(model), "--device", "numpy", "--prune", "off",
               "--threads", "1", "--port", "0", *options]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert server.stdout is not None
    line = server.stdout.readline()
    assert " at http://127.0.0.1:" in line, line
    return server, line.split(" at ")[1].split()[0]


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[tuple[int, str]]:
    """Process id and address."""
    process, url = started(model)
    try:
        yield process.pid, url
    finally:
        process.terminate()
        process.wait(20)


def test_openai(openai: Any, server: tuple[int, str], llm: slimrt.LLM) -> None:
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    (served,) = client.models.list().data
    assert served.id == llm.config.name
    wanted = llm.chat(MESSAGES, max_tokens=8, logprobs=2)
    asked: dict[str, Any] = {"model": served.id, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert choice.message.content == wanted.text and choice.finish_reason == wanted.finish_reason
    assert answer.usage.prompt_tokens == wanted.usage.prompt_tokens
    assert wanted.logprobs is not None
    found = [one.logprob for one in choice.logprobs.content]
    assert found == [one.logprob for one in wanted.logprobs]  # the same computation in another process, written in full
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == wanted.text
    assert chunks[-1].usage.completion_tokens == wanted.usage.completion_tokens
    told = client.responses.create(model=served.id, input="hello world", max_output_tokens=8, temperature=0)
    assert told.output_text == wanted.text
    with client.responses.stream(model=served.id, input="hello world", max_output_tokens=8, temperature=0) as stream:
        events = list(stream)
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == wanted.text
    assert events[-1].response.output_text == wanted.text
    text = client.completions.create(model=served.id, prompt="the world", max_tokens=5, temperature=0).choices[0].text
    assert text == llm.generate("the world", max_tokens=5).text
    vectors = client.embeddings.create(model=served.id, input=["hello", "world"]).data  # base64 on the way
    for vector, expected in zip(vectors, llm.embed(["hello", "world"]), strict=True):
        assert vector.embedding == expected.tolist()
    with pytest.raises(openai.BadRequestError, match="2048") as refused:
        client.chat.completions.create(**{**asked, "messages": [{"role": "user", "content": "hello " * 3000}]})
    assert refused.value.code == "context_length_exceeded"


def test_anthropic(anthropic: Any, server: tuple[int, str], llm: slimrt.LLM) -> None:
    client = anthropic.Anthropic(base_url=server[1], api_key="none", max_retries=0)
    wanted = llm.chat([{"role": "system", "content": "be brief"}, *MESSAGES], max_tokens=8)
    asked: dict[str, Any] = {"model": "any", "system": "be brief", "messages": MESSAGES, "max_tokens": 8}
    asked["extra_body"] = {"temperature": 0}  # which the package no longer names
    answer = client.messages.create(**asked)
    assert "".join(part.text for part in answer.content) == wanted.text
    assert answer.stop_reason == ("max_tokens" if wanted.finish_reason == "length" else "end_turn")
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == wanted.text
        assert stream.get_final_message().usage.output_tokens == wanted.usage.completion_tokens
    counted = client.messages.count_tokens(model="any", system="be brief", messages=MESSAGES)
    assert counted.input_tokens == wanted.usage.prompt_tokens
    with pytest.raises(anthropic.BadRequestError, match="2048"):
        client.messages.create(**{**asked, "messages": [{"role": "user", "content": "hello " * 3000}]})


PLACE = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}


def test_tools_of_openai(openai: Any, server: tuple[int, str], llm: slimrt.LLM) -> None:
    pytest.importorskip("llguidance")
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": PLACE}}]
    asked: dict[str, Any] = {"model": "any", "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    wanted = llm.chat(MESSAGES, **{name: asked[name] for name in asked if name != "model"}, max_tokens=300)
    asked |= {"messages": MESSAGES, "temperature": 0, "max_tokens": 300}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == wanted.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.arguments == wanted.tool_calls[0].arguments
    with client.chat.completions.stream(**asked) as stream:  # which puts the deltas together
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.arguments == wanted.tool_calls[0].arguments
    again: Any = [*MESSAGES, final, {"role": "tool", "tool_call_id": final.tool_calls[0].id, "content": "21"}]
    assert client.chat.completions.create(model="any", messages=again, tools=tools, max_tokens=2).choices
    flat: Any = [{"type": "function", "name": "weather", "parameters": PLACE, "strict": True}]
    with client.responses.stream(
        model="any", input="hello world", tools=flat, tool_choice="required", parallel_tool_calls=False, temperature=0
    ) as events:
        (item,) = events.get_final_response().output
    assert item.type == "function_call" and item.arguments == wanted.tool_calls[0].arguments


def test_tools_of_anthropic(anthropic: Any, server: tuple[int, str], llm: slimrt.LLM) -> None:
    pytest.importorskip("llguidance")
    client = anthropic.Anthropic(base_url=server[1], api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "any", "tools": [{"name": "weather", "input_schema": PLACE}], "max_tokens": 300}
    how: Any = {"type": "any", "disable_parallel_tool_use": True}
    wanted = llm.chat(
        MESSAGES, tools=[{"name": "weather", "parameters": PLACE}], tool_choice="required", parallel_tool_calls=False,
        max_tokens=300,
    )  # fmt: skip
    asked["extra_body"] = {"temperature": 0}
    (block,) = client.messages.create(messages=MESSAGES, tool_choice=how, **asked).content
    assert block.type == "tool_use" and block.input == json.loads(wanted.tool_calls[0].arguments)
    with client.messages.stream(messages=MESSAGES, tool_choice=how, **asked) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use" and final.content[0].input == block.input
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "21"}]}
    again: Any = [*MESSAGES, {"role": "assistant", "content": final.content}, result]
    assert client.messages.create(messages=again, **{**asked, "max_tokens": 2}).usage.output_tokens <= 2


def test_no_field_of_the_packages_is_unknown_but_what_is_not_text(openai: Any, anthropic: Any) -> None:
    """Fields that change accounting, routing or caching at a provider are taken: programs need not be changed."""
    known = openai.OpenAI(api_key="none"), anthropic.Anthropic(api_key="none")
    missing = {
        path: {name for name in inspect.signature(method).parameters if not name.startswith(("extra_", "timeout"))}
        - set(fields)
        for path, method, fields in (
            ("chat", known[0].chat.completions.create, CHAT),
            ("completions", known[0].completions.create, COMPLETION),
            ("responses", known[0].responses.create, RESPONSES),
            ("embeddings", known[0].embeddings.create, EMBEDDINGS),
            ("messages", known[1].messages.create, MESSAGE_FIELDS),
            ("count_tokens", known[1].messages.count_tokens, COUNT),
        )
    }
    # Sound, pictures, search and stored prompts change what is answered: these are refused as unknown.
    assert missing.pop("chat") <= {"audio", "moderation", "web_search_options"}
    assert missing.pop("responses") <= {"access_programs", "background_options", "image", "moderation", "prompt"}
    assert missing.pop("count_tokens") <= {"output_format"}
    assert not any(missing.values()), missing


def test_clients_that_leave_reset_or_talk_nonsense_disturb_nobody(server: tuple[int, str]) -> None:
    """``scripts/crowd.py`` alone does this with more of them (``make clients``)."""
    pid, url = server
    found = asyncio.run(soak(url, connections=32, rounds=2, pid=pid))
    assert found.wrong == []
    assert found.watched >= 2 and found.statuses["reads a stream: 200"] >= 4
    if found.memory:  # the first round warms up
        assert found.memory[-1] - found.memory[0] < 8 << 20


def test_a_server_that_is_told_to_end_ends_in_mid_stream(model: Path) -> None:
    process, url = started(model, "--grace", "1")
    try:
        asked = {"messages": MESSAGES, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(http.client.IncompleteRead):  # the client sees that it was not the whole answer
                answer.read()
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
