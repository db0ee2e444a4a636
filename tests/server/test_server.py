"""The server on a tiny model: OpenAI's and Anthropic's shapes, streams, refusals, turns of several requests."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
from starlette.testclient import TestClient

import slimrt
from slimrt.config import SamplingConfig
from slimrt.engine import Engine
from slimrt.generation import generate_tokens
from slimrt.request import GenerationRequest
from slimrt.reuse import Reading
from slimrt.server import scheduler as scheduling
from slimrt.server.app import create_app
from slimrt.server.limits import Limits
from slimrt.server.scheduler import Busy, Ended, Event, Failed, Job, Piece, Progressed, Read, Scheduler
from slimrt.session import Session
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import EPS32, SLACK

ASK = {"messages": [{"role": "user", "content": "hello world"}], "max_tokens": 8, "temperature": 0, "ignore_eos": True}

IMAGE = [{"role": "user", "content": [{"type": "image_url"}]}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> slimrt.LLM:
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_layers=4, ctx=2048)
    return slimrt.load(path, prune="off", threads=1)


@pytest.fixture(scope="module")
def client(llm: slimrt.LLM) -> Iterator[TestClient]:
    with TestClient(create_app(llm, Limits(body=200_000)), raise_server_exceptions=False) as client:
        yield client


def chunks(answer: Any) -> list[dict[str, Any]]:
    """The JSON of a stream's events."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_chat_answers_what_the_python_interface_answers(client: TestClient, llm: slimrt.LLM) -> None:
    wanted = llm.chat(ASK["messages"], max_tokens=8, ignore_eos=True, session=llm.session())
    answer = client.post("/v1/chat/completions", json={**ASK, "logprobs": True, "top_logprobs": 2}).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert choice["finish_reason"] == wanted.finish_reason == "length"
    assert answer["usage"]["prompt_tokens"] == wanted.usage.prompt_tokens and answer["usage"]["completion_tokens"] == 8
    assert len(choice["logprobs"]["content"]) == 8
    assert all(len(one["top_logprobs"]) == 2 for one in choice["logprobs"]["content"])
    streamed = client.post(
        "/v1/chat/completions", json={**ASK, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream") and "data: [DONE]" in streamed.text
    parts = chunks(streamed)
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts if part["choices"])
    assert text == wanted.text
    assert parts[-2]["choices"][0]["finish_reason"] == "length" and parts[-1]["usage"]["completion_tokens"] == 8


def test_completions_of_several_prompts_and_choices(client: TestClient, llm: slimrt.LLM) -> None:
    prompts = ["the world", llm.tokenize("hello there")]
    wanted = [llm.generate(p, max_tokens=5, session=llm.session(), ignore_eos=True).text for p in prompts]
    asked = {"prompt": prompts, "max_tokens": 5, "temperature": 0, "n": 2, "ignore_eos": True}
    answer = client.post("/v1/completions", json=asked).json()
    assert [(one["index"], one["text"]) for one in answer["choices"]] == [
        (0, wanted[0]), (1, wanted[0]), (2, wanted[1]), (3, wanted[1]),
    ]  # fmt: skip
    assert answer["usage"]["completion_tokens"] == 20
    one = client.post("/v1/completions", json={**asked, "prompt": "the world", "n": 1, "echo": True, "stop": ["zzz"]})
    assert one.json()["choices"][0]["text"] == "the world" + wanted[0]
    seeded = {**asked, "prompt": "the", "n": 1, "temperature": 1.5, "seed": 7}
    first, again = (client.post("/v1/completions", json=seeded).json()["choices"][0]["text"] for _ in range(2))
    assert first == again
    three = client.post("/v1/completions", json={**seeded, "n": 3, "max_tokens": 12}).json()["choices"]
    alone = client.post("/v1/completions", json={**seeded, "seed": 8, "max_tokens": 12}).json()["choices"]
    assert three[1]["text"] == alone[0]["text"] and len({one["text"] for one in three}) == 3


def test_messages_and_responses(client: TestClient, llm: slimrt.LLM) -> None:
    wanted = llm.chat(
        [{"role": "system", "content": "be brief"}, *ASK["messages"]], max_tokens=6, session=llm.session()
    )
    asked = {"system": "be brief", "messages": ASK["messages"], "max_tokens": 6, "temperature": 0}
    answer = client.post("/v1/messages", json=asked).json()
    assert "".join(part["text"] for part in answer["content"]) == wanted.text
    assert answer["stop_reason"] == ("max_tokens" if wanted.finish_reason == "length" else "end_turn")
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == wanted.usage.prompt_tokens
    counted = client.post("/v1/messages/count_tokens", json={"system": "be brief", "messages": ASK["messages"]})
    assert counted.json() == {"input_tokens": wanted.usage.prompt_tokens}
    events = chunks(client.post("/v1/messages", json={**asked, "stream": True}))
    assert [one["type"] for one in events if one["type"] != "content_block_delta"] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert "".join(one["delta"]["text"] for one in events if one["type"] == "content_block_delta") == wanted.text
    asked = {"instructions": "be brief", "input": "hello world", "max_output_tokens": 6, "temperature": 0}
    answer = client.post("/v1/responses", json={**asked, "tools": [{"type": "web_search"}]}).json()
    assert answer["output"][0]["content"][0]["text"] == wanted.text
    assert answer["status"] == ("incomplete" if wanted.finish_reason == "length" else "completed")
    events = chunks(client.post("/v1/responses", json={**asked, "stream": True}))
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created" and events[-1]["response"]["output"] != []
    assert "".join(one["delta"] for one in events if one["type"] == "response.output_text.delta") == wanted.text


def test_answers_are_bound_to_a_schema_or_grammar(client: TestClient) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    hot = {"messages": ASK["messages"], "max_tokens": 60, "temperature": 2, "seed": 1}
    (choice,) = client.post("/v1/chat/completions", json={**hot, "response_format": form}).json()["choices"]
    assert json.loads(choice["message"]["content"])["a"] in ("x", "yy") and choice["finish_reason"] == "stop"
    form_there = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    answer = client.post("/v1/responses", json={"input": "hello", "temperature": 2, "text": form_there}).json()
    assert json.loads(answer["output"][0]["content"][0]["text"])["a"] in ("x", "yy")
    asked = {"prompt": "hello", "max_tokens": 30, "temperature": 1, "grammar": 'root ::= "hi" "ho" "!"', "stream": True}
    parts = chunks(client.post("/v1/completions", json=asked))
    assert "".join(part["choices"][0]["text"] for part in parts) == "hiho!"
    nonsense = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    for bad in (
        {"response_format": {"type": "poem"}}, {"grammar": "what?"}, {"response_format": nonsense},
        {"response_format": form, "grammar": "root ::= x"},
    ):  # fmt: skip
        refused = client.post("/v1/chat/completions", json={**hot, **bad})
        assert refused.status_code == 400 and "\n" not in refused.json()["error"]["message"], refused.text
    assert client.post("/v1/responses", json={"input": "x", "text": {"format": "poem"}}).status_code == 400


def test_tokens_embeddings_models_and_what_operators_look_at(client: TestClient, llm: slimrt.LLM) -> None:
    ids = client.post("/tokenize", json={"content": "hello world"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"content": "hello world"}
    texts = ["hello world", "there", "hello"]
    found = client.post("/v1/embeddings", json={"input": texts}).json()
    vectors = np.array([one["embedding"] for one in found["data"]])
    assert vectors.shape == (3, llm.config.d_model) and np.array_equal(vectors, llm.embed(texts))
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.abs(lengths - 1).max() <= SLACK * EPS32  # float32's rounding of sum and root
    # Reading is causal, so the vector of a text's last token is that of its tokens read alone.
    last = llm.embed("hello world", pooling="last", normalize=False)
    count = len(llm.tokenize("hello world"))
    whole = llm.embed([llm.tokenize("hello world")], pooling="mean", normalize=False) * np.float32(count)
    rest = llm.embed([llm.tokenize("hello world")[:-1]], normalize=False) * np.float32(count - 1)
    states = llm.token_states(llm.tokenize("hello world"))
    sums = states.astype(np.float64).sum(axis=0)
    unit = np.abs(states.mean(axis=0) * np.float32(count) - sums).max()  # a mean in float32, and back
    assert np.abs(whole - rest - last).max() <= 2 * SLACK * max(unit, EPS32 * np.abs(sums).max())
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == llm.config.name and model["slimrt"]["context"] == llm.ctx
    assert client.get(f"/v1/models/{model['id']}").status_code == 200
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json()["status"] == "ok"
    health = client.get("/health").json()
    assert health["memory_bytes"] > 1 << 20 and health["idle_kv_bytes"] >= 0
    text = client.get("/metrics").text
    for name in (
        "time_to_first_token_seconds_count",
        "inter_token_seconds_bucket",
        "requests_waiting",
        "idle_kv_bytes",
    ):
        assert f"slimrt_{name}" in text
    told = client.get("/openapi.json").json()
    assert told["openapi"] == "3.1.0" and "/v1/messages" in told["paths"]
    page = client.get("/")
    assert page.status_code == 200 and "http" not in page.text.split("<script>")[0]  # nothing from elsewhere


def test_files_become_text(client: TestClient) -> None:
    def sent(raw: bytes, name: str) -> Any:
        return client.post("/document", json={"name": name, "data": base64.b64encode(raw).decode()})

    assert sent("Café".encode(), "a.txt").json() == {"name": "a.txt", "content": "Café"}
    assert sent(b"<h1>Title</h1><script>1</script><p>Text</p>", "a.html").json()["content"] == "# Title\n\nText"
    for raw, name, told in (
        (b"%PDF-1.7", "a.pdf", "a.pdf: "),
        (b"\x89PNG", "b.png", "b.png: is a picture"),
        (b"\xe9", "c", "c: byte 0"),
    ):
        refused = sent(raw, name)
        assert refused.status_code == 400 and refused.json()["error"]["message"].startswith(told)
    assert (
        client.post("/document", json={"name": "a", "data": "?"}).json()["error"]["message"] == "'data' is not base64"
    )


def test_the_answer_tells_which_tokens_were_kept(tmp_path: Path) -> None:
    llm = slimrt.load(
        write_tiny_llama(tmp_path / "tiny.gguf", n_layers=4, ctx=2048),
        threads=1,
        device="numpy",
        prune=slimrt.PrunePlan((slimrt.Stage(1, 128), slimrt.Stage(2, 64)), block=16),
    )
    with TestClient(create_app(llm)) as client:
        prompt = list(np.random.default_rng(0).integers(0, 200, 300).tolist())
        told = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).json()["timings"]
    sizes = [sum(end - first for first, end in runs) for runs in told["kept_runs"]]
    assert sizes == told["kept_tokens"] and len(sizes) == 2
    kept = [{at for first, end in runs for at in range(first, end)} for runs in told["kept_runs"]]
    assert kept[1] < kept[0] <= set(range(300)) and {0, 299} <= kept[1]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/chat/completions", b"{", "no JSON"),
        ("/v1/chat/completions", b"[1]", "must be an object"),
        ("/v1/chat/completions", b'{"messages": NaN}', "NaN"),
        ("/v1/chat/completions", b"\xff", "no JSON"),
        ("/v1/chat/completions", b"[" * 100_000, "no JSON"),
        ("/v1/chat/completions", {}, "Missing required parameter: 'messages'"),
        ("/v1/chat/completions", {**ASK, "wings": 1}, "Unknown parameter: 'wings'"),
        ("/v1/chat/completions", {**ASK, "temperature": "hot"}, "'temperature' is of type string; it must be number"),
        ("/v1/chat/completions", {**ASK, "top_p": 3}, "'top_p' is 3; it must lie in 0 to 1"),
        ("/v1/chat/completions", {**ASK, "n": 1000}, "'n' is 1000"),
        ("/v1/chat/completions", {**ASK, "max_tokens": 0}, "'max_tokens' is 0; it must lie in 1 to 2,147,483,648"),
        ("/v1/chat/completions", {**ASK, "max_tokens": True}, "'max_tokens' is of type boolean"),
        ("/v1/chat/completions", {**ASK, "messages": []}, "'messages' is empty"),
        ("/v1/chat/completions", {**ASK, "messages": [{"role": "king", "content": ""}]}, "role 'king'"),
        ("/v1/chat/completions", {**ASK, "messages": ["hi"]}, "messages[0] is 'hi'; it must be an object"),
        ("/v1/chat/completions", {**ASK, "messages": IMAGE}, "text only"),
        ("/v1/chat/completions", {**ASK, "logit_bias": {"x": 1}}, "'logit_bias' has 'x'"),
        ("/v1/chat/completions", {**ASK, "stop": [""]}, "'stop' must be"),
        ("/v1/completions", {"prompt": ""}, "no tokens"),
        ("/v1/completions", {"prompt": [99999999]}, "this model has ids"),
        ("/v1/completions", {"prompt": [[1], [2]] * 20}, "at most 16"),
        ("/v1/messages", {"messages": ASK["messages"]}, "max_tokens"),
        ("/v1/responses", {"input": "x", "previous_response_id": "y"}, "nothing is stored"),
        ("/v1/embeddings", {"input": ""}, "'input'"),
        ("/v1/embeddings", {"input": "x", "dimensions": 3}, "'dimensions' is 3"),
        ("/detokenize", {"tokens": [-1]}, "ids lie in"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line(client: TestClient, path: str, body: Any, said: str) -> None:
    answer = client.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
    assert answer.status_code == 400, answer.text
    told = answer.json()
    message = told["error"]["message"]
    assert said in message and "\n" not in message
    assert ("type" in told) == path.startswith("/v1/messages")


def test_what_is_too_long_too_large_elsewhere_or_without_a_key(client: TestClient, llm: slimrt.LLM) -> None:
    long = {**ASK, "messages": [{"role": "user", "content": "hello " * 3000}]}
    for stream in (False, True):
        answer = client.post("/v1/chat/completions", json={**long, "stream": stream})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
        assert "2048" in answer.json()["error"]["message"] and "tokens" in answer.json()["error"]["message"]
    assert client.post("/v1/chat/completions", content=b" " * 200_001).status_code == 413
    endless = client.post("/v1/completions", content='{"prompt": "a", "temperature": 1e999}')
    assert "'temperature' is of type number past all range" in endless.json()["error"]["message"]
    assert client.get("/v1/nothing").status_code == 404 and client.get("/v1/completions").status_code == 405
    assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": "http://x"}).headers
    with TestClient(create_app(llm, Limits(key="secret", origins=("http://x",)))) as guarded:
        assert guarded.get("/health").status_code == 200 and guarded.get("/v1/models").status_code == 401
        for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert guarded.get("/v1/models", headers=headers).status_code == 200
        assert (
            guarded.get("/v1/models", headers={"Authorization": "Bearer wrong\u00e9".encode("latin-1")}).status_code
            == 401
        )
        assert (
            guarded.get("/health", headers={"Origin": "http://x"}).headers["access-control-allow-origin"] == "http://x"
        )


# -- turns -------------------------------------------------------------------------------------------------------------


class Listener:
    """Collects a job's events."""

    def __init__(self) -> None:
        self.events: list[tuple[float, Event]] = []
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append((time.monotonic(), event))
        if isinstance(event, Ended | Failed):
            self.over.set()

    def of(self, kind: type) -> list[Any]:
        return [event for _, event in self.events if isinstance(event, kind)]


def request(tokens: int) -> GenerationRequest:
    return GenerationRequest(max_tokens=tokens, ignore_eos=True)


def test_a_stream_goes_on_while_a_long_prompt_is_read_and_a_short_one_overtakes(llm: slimrt.LLM) -> None:
    scheduler = Scheduler(llm, sessions=3)
    rng = np.random.default_rng(0)
    stream, long, short = Listener(), Listener(), Listener()
    try:
        scheduler.submit(Job(rng.integers(3, 200, 20).tolist(), request(2000), stream))
        while len(stream.of(Piece)) < 3:
            time.sleep(0.001)
        order: list[str] = []
        ids = rng.integers(3, 200, 1500).tolist()

        def reading(event: Event) -> None:
            long(event)
            if isinstance(event, Progressed):
                order.append(f"layer {event.done}")
                if event.done == 1:
                    scheduler.submit(Job(ids[:30], request(1), short))
            elif isinstance(event, Read):
                order.append("read")

        before = len(stream.of(Piece))
        scheduler.submit(Job(ids, request(4), reading, progress=True))
        assert long.over.wait(60) and short.over.wait(60)
        read_at = next(at for at, event in long.events if isinstance(event, Read))
        assert order == [*(f"layer {n}" for n in range(1, 5)), "read"]
        assert next(at for at, event in short.events if isinstance(event, Read)) < read_at
        assert len(stream.of(Piece)) > before
        # Turns, also those within a layer, change nothing of what is written.
        alone = llm.generate(ids, max_tokens=4, session=llm.session(), ignore_eos=True)
        assert [piece.step.token for piece in long.of(Piece) if piece.step.token is not None] == alone.tokens
    finally:
        scheduler.close()
    assert stream.over.is_set()  # what was under way is told that there is no more


def test_streams_are_read_together_and_write_what_each_writes_alone(
    llm: slimrt.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    if llm.engine.together == 1:
        pytest.skip("this backend reads tokens one by one")
    passes: list[int] = []
    whole = Engine.decode_together

    def counted(self: Engine, reads: list[Any]) -> list[np.ndarray]:
        passes.append(len(reads))
        return whole(self, reads)

    monkeypatch.setattr(Engine, "decode_together", counted)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, 200, length).tolist() for length in (40, 7, 90)]
    asked = [
        replace(request(60), sampling=SamplingConfig(temperature=0.9, seed=3)),
        replace(request(50), draft=None),
        replace(request(70), sampling=SamplingConfig(repeat_penalty=1.3)),
    ]
    scheduler, listeners = Scheduler(llm, sessions=3), [Listener() for _ in prompts]
    try:
        for ids, how, listener in zip(prompts, asked, listeners, strict=True):
            scheduler.submit(Job(ids, how, listener))
        assert all(listener.over.wait(60) for listener in listeners)
    finally:
        scheduler.close()
    assert max(passes) == 3 and len(passes) > 30
    for ids, how, listener in zip(prompts, asked, listeners, strict=True):
        session = llm.session()
        session.prefill(ids)
        alone = [step.token for step in generate_tokens(session, llm.tokenizer, how) if step.token is not None]
        assert [piece.step.token for piece in listener.of(Piece) if piece.step.token is not None] == alone


def test_what_was_read_ahead_is_forgotten_where_another_call_comes(llm: slimrt.LLM) -> None:
    if llm.engine.together == 1:
        pytest.skip("this backend reads tokens one by one")
    ids = list(range(3, 40))
    one, other, alone = (llm.session() for _ in range(3))
    for session in (one, other, alone):
        session.prefill(ids)
    Session.read_together([(one, [5, 6]), (other, [7])])
    assert one.tokens == ids and one.holds_ahead([5, 6]) and not one.holds_ahead([5])
    wanted = alone.decode([5, 6])
    assert np.array_equal(one.decode([5, 6]), wanted) and one.tokens == [*ids, 5, 6]
    other.extend([9])  # not what was read ahead
    alone.truncate(len(ids))
    alone.extend([9])
    assert other.tokens == [*ids, 9] and np.array_equal(other.logits, alone.logits)


def test_a_client_that_goes_frees_its_place_also_within_its_prompt(llm: slimrt.LLM) -> None:
    scheduler = Scheduler(llm, sessions=1, queue=1)
    ids = np.random.default_rng(1).integers(3, 200, 1500).tolist()
    try:
        gone, waits = Listener(), Listener()
        job: Job

        def leaves(event: Event) -> None:
            gone(event)
            if isinstance(event, Progressed):
                scheduler.cancel(job)

        job = Job(ids, request(100), leaves, progress=True)
        scheduler.submit(job)
        while not gone.of(Progressed):
            time.sleep(0.001)
        scheduler.submit(Job(ids[:20], request(2), waits))
        assert waits.over.wait(60) and waits.of(Ended)
        assert len(gone.of(Progressed)) == 1 and not gone.of(Read)
        # Of two more one waits, a third is turned away.
        blocker, second = Listener(), Listener()
        first = Job(ids[:10], request(2000), blocker)
        scheduler.submit(first)
        while not blocker.of(Piece):
            time.sleep(0.001)
        scheduler.submit(Job(ids[:10], request(1), second))
        with pytest.raises(Busy, match="try again in"):
            scheduler.submit(Job(ids[:10], request(1), Listener()))
        scheduler.cancel(first)
        assert second.over.wait(60) and second.of(Ended)
    finally:
        scheduler.close()


def test_a_defect_behind_an_answer_ends_that_request_alone(llm: slimrt.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find(self, *_: Any) -> None: ...

        def keep(self, *_: Any) -> None:
            raise RuntimeError("no")

    monkeypatch.setattr(llm.engine, "library", Broken())
    scheduler = Scheduler(llm, sessions=1)
    try:
        for _ in range(2):
            listener = Listener()
            scheduler.submit(Job([5, 6, 7], request(2), listener))
            assert listener.over.wait(60) and listener.of(Ended)
    finally:
        scheduler.close()


def test_what_was_read_is_not_read_again(llm: slimrt.LLM) -> None:
    scheduler = Scheduler(llm, sessions=2)
    rng = np.random.default_rng(2)
    one, other = rng.integers(3, 200, 300).tolist(), rng.integers(3, 200, 300).tolist()
    try:
        reused = []
        for ids in (one, other, [*one, 5, 6, 7], [*other, 5, 6], one[:290]):
            listener = Listener()
            scheduler.submit(Job(ids, request(2), listener))
            assert listener.over.wait(60)
            reused.append(listener.of(Read)[0].reading.reused)
        assert reused[:2] == [0, 0] and min(reused[2:]) > 250
        assert scheduler.kv_bytes > 0
    finally:
        scheduler.close()


def test_what_cuts_left_unread_is_read_while_nobody_asks(llm: slimrt.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_IDLE_S", 0.01)
    monkeypatch.setattr(scheduling, "LEAST", 200)
    began, goes_on, complete = threading.Event(), threading.Event(), Session.complete
    ended: list[int] = []

    def completes(session: Session, progress: Any = None) -> int:
        began.set()
        goes_on.wait(60)
        try:
            ended.append(complete(session, progress))
        except BaseException:
            ended.append(-1)
            raise
        return ended[-1]

    monkeypatch.setattr(Session, "complete", completes)
    plan = slimrt.PrunePlan(stages=(slimrt.Stage(1, 0.5),), block=8, unit=4, query_window=4, questions=2)
    cuts = slimrt.load(llm.file.path, device="numpy", prune=plan)
    document = np.random.default_rng(3).integers(3, 200, 300).tolist()
    scheduler = Scheduler(cuts, sessions=2)

    def asked(ids: list[int]) -> tuple[Reading, list[int]]:
        listener = Listener()
        scheduler.submit(Job(ids, request(3), listener))
        if began.is_set():
            goes_on.set()
        assert listener.over.wait(60)
        return listener.of(Read)[0].reading, [piece.step.token for piece in listener.of(Piece)][:3]

    try:
        assert asked([*document, 5, 6])[0].stages
        assert began.wait(60) and not ended
        assert asked([7, 8, 9])[0].reused == 0  # while it is read: that ends at once, and begins again later
        until = time.monotonic() + 60
        while ended[-1] < 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert ended == [-1, 302]
        reading, tokens = asked([*document, 9, 10, 11])
        assert reading.stages == () and "read whole before" in reading.dense and reading.reused == 300
        assert tokens == cuts.generate([*document, 9, 10, 11], max_tokens=3, ignore_eos=True, prune="off").tokens
    finally:
        goes_on.set()
        scheduler.close()
