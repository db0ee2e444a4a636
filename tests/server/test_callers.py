"""Who may ask a server on this machine, and what completions say of their prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette")
from starlette.testclient import TestClient

import slimrt
from slimrt.server.app import create_app
from slimrt.server.limits import Limits
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import EPS32, SLACK

HERE = "http://127.0.0.1:8080"
ASK = {"prompt": [5, 6, 7, 8], "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> slimrt.LLM:
    path: Path = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", ctx=256)
    return slimrt.load(path, device="numpy", prune="off")


@pytest.fixture(scope="module")
def client(llm: slimrt.LLM) -> Iterator[TestClient]:
    with TestClient(create_app(llm), base_url=HERE) as client:
        yield client


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": HERE}, 200),
        ({"Host": "localhost:8080"}, 200),
        ({"Host": "localhost:8080", "Origin": "http://localhost:8080"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
        ({"Origin": "https://proxy.example", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://[", "Host": "["}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "null", "Content-Type": "text/plain"}, 403),
        ({"Host": "evil.example:8080"}, 403),
        ({"Host": "evil.example:8080", "Origin": "http://evil.example:8080"}, 403),
    ],
)
def test_pages_of_other_hosts_may_not_ask(client: TestClient, headers: dict[str, str], status: int) -> None:
    """Nor where their name was made to point to this machine; programs send no origin."""
    answer = client.post("/v1/completions", content=json.dumps(ASK), headers=headers)
    assert answer.status_code == status, answer.text
    if status == 403:
        assert "--cors" in answer.json()["error"]["message"]
    assert client.get("/health", headers=headers).status_code == 200


def test_pages_that_are_let_in_and_callers_with_a_key(llm: slimrt.LLM) -> None:
    page = {"Host": "app.example", "Origin": "https://app.example"}
    with TestClient(create_app(llm, Limits(origins=("https://app.example",))), base_url=HERE) as client:
        assert client.get("/v1/models", headers=page).status_code == 200
        assert client.get("/v1/models", headers={**page, "Origin": "https://b.example"}).status_code == 403
    with TestClient(create_app(llm, Limits(origins=("*",))), base_url=HERE) as client:
        assert client.get("/v1/models", headers={**page, "Origin": "https://b.example"}).status_code == 200
    with TestClient(create_app(llm, Limits(key="k")), base_url=HERE) as client:
        assert client.get("/v1/models", headers={**page, "x-api-key": "k"}).status_code == 200
    with TestClient(create_app(llm), base_url="http://10.1.2.3:8080") as client:  # not this machine alone
        assert client.get("/v1/models", headers={"Host": "box.example"}).status_code == 200


def test_an_answer_goes_on_from_what_the_assistant_began(client: TestClient, llm: slimrt.LLM) -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the <|im_end|>"}]
    asked = {"model": "any", "max_tokens": 4, "temperature": 0, "messages": talk}
    ids = llm.chat_tokens(talk[:1]) + llm.tokenizer.encode_within("the <|im_end|>")
    answer = client.post("/v1/messages", json=asked).json()
    (block,) = answer["content"]
    assert block["text"] == llm.generate(ids, max_tokens=4, session=llm.session()).text
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(ids)
    counted = client.post("/v1/messages/count_tokens", json={"model": "any", "messages": talk}).json()
    assert counted == {"input_tokens": len(ids)}


def test_an_echo_tells_the_log_probabilities_of_the_prompt(client: TestClient, llm: slimrt.LLM) -> None:
    ids, asked = ASK["prompt"], {**ASK, "echo": True, "logprobs": 2}
    wanted = llm.logprobs(ids, 1)  # type: ignore[arg-type]
    (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1:4], wanted, rtol=SLACK * EPS32)
    assert len(found["tokens"]) == 6 and "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"][0] == 0 and all(len(top) >= 2 for top in found["top_logprobs"][1:])
    (alone,) = client.post("/v1/completions", json={**asked, "max_tokens": 0}).json()["choices"]
    assert alone["logprobs"]["token_logprobs"] == found["token_logprobs"][:4]
    streamed = client.post("/v1/completions", json={**asked, "stream": True}).text
    parts = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    told = [value for part in parts for value in (part["choices"][0]["logprobs"] or {}).get("token_logprobs", [])]
    assert told == found["token_logprobs"]
    many = client.post("/v1/completions", json={**asked, "prompt": [5] * 300})
    assert many.status_code == 400 and "300 tokens" in many.json()["error"]["message"]
