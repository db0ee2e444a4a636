"""Tools through the server: every interface's calls and results, whole and streamed, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")
from starlette.testclient import TestClient

import slimrt
from slimrt.server.app import create_app
from tests.tiny_gguf import write_tiny_llama

PLACE = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}
ABOUT = {"name": "weather", "description": "Weather", "parameters": PLACE}
TOOLS = [{"type": "function", "function": ABOUT}]
TALK = [{"role": "user", "content": "hello world"}]
HOT = {"temperature": 2, "seed": 1}
CHAT = {"messages": TALK, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, **HOT}
RESPONSE = {
    "input": "hello world", "tools": [{"type": "function", **ABOUT}, {"type": "web_search"}],
    "tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False, "temperature": 2,
}  # fmt: skip
MESSAGE = {
    "messages": TALK, "max_tokens": 400, "temperature": 1,
    "tools": [{"name": "weather", "input_schema": PLACE}, {"type": "web_search_20250305", "name": "web_search"}],
    "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> slimrt.LLM:
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", ctx=2048)
    return slimrt.load(path, device="numpy", prune="off", threads=1)


@pytest.fixture(scope="module")
def client(llm: slimrt.LLM) -> Iterator[TestClient]:
    with TestClient(create_app(llm), raise_server_exceptions=False) as client:
        yield client


def chunks(answer: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def fits(arguments: Any) -> bool:
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    return list(value) == ["city"] and len(value["city"]) <= 5


def test_chat(client: TestClient) -> None:
    (choice,) = client.post("/v1/chat/completions", json=CHAT).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["type"] == "function" and call["function"]["name"] == "weather" and fits(call["function"]["arguments"])
    parts = [one["choices"][0] for one in chunks(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))]
    told = [one["delta"]["tool_calls"][0] for one in parts if "tool_calls" in one["delta"]]
    assert told[0] == {
        "index": 0, "id": told[0]["id"], "type": "function", "function": {"name": "weather", "arguments": ""},
    }  # fmt: skip
    assert "".join(one["function"]["arguments"] for one in told) == call["function"]["arguments"]
    assert parts[0]["delta"] == {"role": "assistant", "content": ""} and parts[-1]["finish_reason"] == "tool_calls"
    both = client.post("/v1/chat/completions", json={**CHAT, "n": 2, "logprobs": True}).json()["choices"]
    assert all(fits(one["message"]["tool_calls"][0]["function"]["arguments"]) for one in both)
    assert both[0]["logprobs"]["content"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "21"}]}
    again = [*TALK, choice["message"], result]
    answer = client.post("/v1/chat/completions", json={"messages": again, "tools": TOOLS, "max_tokens": 4}).json()
    plain = client.post("/v1/chat/completions", json={"messages": TALK, "max_tokens": 4}).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 20


def test_chat_in_the_older_words(client: TestClient) -> None:
    asked = {"messages": TALK, "functions": [ABOUT], "function_call": {"name": "weather"}, **HOT}
    (choice,) = client.post("/v1/chat/completions", json=asked).json()["choices"]
    assert choice["finish_reason"] == "function_call" and "tool_calls" not in choice["message"]
    assert fits(choice["message"]["function_call"]["arguments"])
    parts = [one["choices"][0] for one in chunks(client.post("/v1/chat/completions", json={**asked, "stream": True}))]
    told = [one["delta"]["function_call"] for one in parts if "function_call" in one["delta"]]
    assert told[0]["name"] == "weather" and fits("".join(one["arguments"] for one in told))
    again = [*TALK, choice["message"], {"role": "function", "name": "weather", "content": "21"}]
    assert client.post("/v1/chat/completions", json={"messages": again, "max_tokens": 2}).status_code == 200


def test_a_schema_beside_tools(client: TestClient) -> None:
    """An answer is calls, or valid by the schema."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for seed in range(3):
        asked = {"messages": TALK, "tools": TOOLS, "response_format": form, "temperature": 2, "seed": seed}
        (choice,) = client.post("/v1/chat/completions", json={**asked, "max_tokens": 400}).json()["choices"]
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["message"]["content"])["n"] in (1, 2)
        else:
            assert fits(choice["message"]["tool_calls"][0]["function"]["arguments"])


def test_what_a_limit_cuts(client: TestClient) -> None:
    (choice,) = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 12}).json()["choices"]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"].startswith("<tool_call>")
    answer = client.post("/v1/messages", json={**MESSAGE, "max_tokens": 12}).json()
    assert answer["stop_reason"] == "max_tokens" and answer["content"][0]["text"].startswith("<tool_call>")


def test_responses(client: TestClient) -> None:
    answer = client.post("/v1/responses", json=RESPONSE).json()
    (item,) = answer["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "weather", "completed")
    assert fits(item["arguments"]) and answer["status"] == "completed" and len(answer["tools"]) == 1
    events = chunks(client.post("/v1/responses", json={**RESPONSE, "stream": True}))
    kinds = [one["type"].removeprefix("response.") for one in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    told = "".join(one["delta"] for one in events if one["type"] == "response.function_call_arguments.delta")
    assert fits(told) and events[-1]["response"]["output"][0]["arguments"] == told == events[-3]["arguments"]
    again = [
        {"role": "user", "content": "hello"},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"city": "x"}'},
        {"type": "function_call", "call_id": "b", "name": "weather", "arguments": '{"city": "y"}'},
        {"type": "function_call_output", "call_id": "a", "output": "21"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "22"}]},
    ]
    found = client.post("/v1/responses", json={"input": again, "max_output_tokens": 3}).json()
    assert found["output"][0]["type"] == "message"


def test_messages(client: TestClient) -> None:
    answer = client.post("/v1/messages", json=MESSAGE).json()
    (block,) = answer["content"]
    assert (block["type"], block["name"], answer["stop_reason"]) == ("tool_use", "weather", "tool_use")
    assert fits(block["input"])
    events = chunks(client.post("/v1/messages", json={**MESSAGE, "stream": True}))
    assert events[1]["content_block"] == {**events[1]["content_block"], "type": "tool_use", "input": {}}
    told = [one["delta"] for one in events if one["type"] == "content_block_delta"]
    assert {one["type"] for one in told} == {"input_json_delta"} and fits("".join(one["partial_json"] for one in told))
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    result = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "21"}]},
        {"type": "text", "text": "so?"},
    ]
    again = [*TALK, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": result}]
    asked = {"messages": again, "tools": MESSAGE["tools"]}
    counted = client.post("/v1/messages/count_tokens", json=asked).json()["input_tokens"]
    found = client.post("/v1/messages", json={**asked, "max_tokens": 3}).json()
    assert found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"] == counted


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("chat/completions", {**CHAT, "tools": [1]}, "tools[0] is 1"),
        (
            "chat/completions",
            {**CHAT, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "no tool has this",
        ),
        ("chat/completions", {"messages": TALK, "tool_choice": "required"}, "there are no tools"),
        ("chat/completions", {**CHAT, "grammar": "start: /a/"}, "tools with a Lark grammar"),
        ("chat/completions", {**CHAT, "parallel_tool_calls": "x"}, "'parallel_tool_calls' is of type string"),
        ("chat/completions", {"messages": TALK, "functions": [{"name": "a b"}]}, "1 to 128 letters"),
        (
            "chat/completions",
            {"messages": [*TALK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "are no JSON object",
        ),
        ("responses", {**RESPONSE, "tools": [{"type": "function", "name": "f", "parameters": 3}]}, "JSON schema"),
        ("responses", {"input": [{"type": "function_call", "name": 3}]}, "a tool call is"),
        (
            "messages",
            {**MESSAGE, "tools": [{"name": "f", "input_schema": {"type": "array"}}]},
            "arguments are an object",
        ),
        ("messages", {**MESSAGE, "tool_choice": {"type": "tool", "name": "x"}}, "no tool has this name"),
    ],
)
def test_what_is_refused(path: str, body: dict[str, Any], says: str, client: TestClient) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and says in message and "\n" not in message, message
