"""The routes: who may ask, how much, and how an answer goes out, in one piece or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Any, Protocol

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from slimrt import __version__
from slimrt.errors import SlimrtError
from slimrt.llm import LLM
from slimrt.memory.resident import resident_bytes
from slimrt.request import GenerationRequest
from slimrt.server.anthropic import MessageReply, counted_tokens, message_prompt
from slimrt.server.bodies import read_json
from slimrt.server.callers import check_caller
from slimrt.server.documents import document
from slimrt.server.echo import Scored, prompt_logprobs
from slimrt.server.embeddings import embeddings
from slimrt.server.errors import ApiError
from slimrt.server.fields import checked
from slimrt.server.limits import Limits
from slimrt.server.metrics import Metrics
from slimrt.server.openai import ChatReply, CompletionReply, chat_prompt, completion_prompts, whole_completion
from slimrt.server.openapi import DETOKENIZE, TOKENIZE, description
from slimrt.server.responses import ResponseReply, response_prompt
from slimrt.server.scheduler import Busy, Ended, Event, Failed, Job, Piece, Read, Scheduler, Stopping

__all__ = ["create_app"]

_PING_S = 15
_READERS = 2  # documents that become text at a time, each in a process that may take a gibibyte
_OPEN = ("/", "/health", "/openapi.json")  # paths that need no key


class Reply(Protocol):
    """What collects an answer and tells the chunks of it."""

    prompt_tokens: int
    progress: bool

    def take(self, event: Event) -> Any:
        """The chunks that an event makes."""


Work = Sequence[tuple[Any, Sequence[int], GenerationRequest, int]]  # (a Reply, prompt, how it is answered, choices)


class _Server:
    def __init__(self, llm: LLM, limits: Limits) -> None:
        self.llm, self.limits = llm, limits
        self.scheduler = Scheduler(llm, sessions=limits.sessions, queue=limits.queue)
        self.metrics = Metrics(self.scheduler)
        self.description = description(llm)
        self.readers = asyncio.Semaphore(_READERS)

    # -- routes -------------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        page = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def health(self, request: Request) -> Response:
        state = {
            "status": "ok", "running": self.scheduler.running, "waiting": self.scheduler.waiting,
            "memory_bytes": resident_bytes(), "idle_kv_bytes": self.scheduler.kv_bytes,
        }  # fmt: skip
        return JSONResponse(state)

    async def get_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.description)

    def _model(self) -> dict[str, Any]:
        c = self.llm.config
        return {
            "id": c.name, "object": "model", "created": 0, "owned_by": "slimrt",
            "slimrt": {
                "context": self.llm.ctx, "trained_context": c.ctx_train, "parameters": c.n_params,
                "vocabulary": c.vocab_size, "backend": self.llm.backend.ops.name, "plan": self.llm.plan.source,
                "version": __version__,
            },
        }  # fmt: skip

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.llm.config.name:
            raise ApiError(404, f"there is no model '{request.path_params['name'][:80]}'", code="model_not_found")
        return JSONResponse(self._model())

    async def tokenize(self, request: Request) -> Response:
        values = checked(TOKENIZE, await self._json(request))
        ids = await asyncio.to_thread(self.llm.tokenizer.encode, values["content"], **_encoding(self.llm, values))
        return JSONResponse({"tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        tokens = checked(DETOKENIZE, await self._json(request))["tokens"]
        vocab = self.llm.config.vocab_size
        for token in tokens:
            if type(token) is not int or not 0 <= token < vocab:
                raise ApiError(400, f"token {str(token)[:40]}: ids lie in 0..{vocab - 1}", param="tokens")
        return JSONResponse({"content": self.llm.detokenize(tokens)})

    async def document(self, request: Request) -> Response:
        data = await self._json(request)
        async with self.readers:
            return JSONResponse(await asyncio.to_thread(document, data))

    async def embeddings(self, request: Request) -> Response:
        data = await self._json(request)
        return JSONResponse(await asyncio.to_thread(embeddings, self.llm, data))

    async def chat(self, request: Request) -> Response:
        values, ids, asked, calling = await self._prompt(chat_prompt, request)
        options = values["stream_options"] or {}
        reply = ChatReply(
            self.llm, len(ids), choices=values["n"], usage=bool(options.get("include_usage")),
            progress=bool(options.get("include_progress")), calling=calling, older=values["older"],
        )  # fmt: skip
        if values["stream"]:
            return await self._stream(request, [(reply, ids, asked, values["n"])], _openai_event, end="[DONE]")
        await self._collect(request, [(reply, ids, asked, values["n"])])
        return JSONResponse(reply.whole(logprobs=values["logprobs"]))

    async def completion(self, request: Request) -> Response:
        values, prompts, asked = await self._prompt(completion_prompts, request)
        options, n = values["stream_options"] or {}, values["n"]
        work = []
        for number, ids in enumerate(prompts):
            scored: Scored = []
            if values["echo"] and values["logprobs"] is not None:
                scored = await asyncio.to_thread(prompt_logprobs, self.llm, ids, values["logprobs"])
            reply = CompletionReply(
                self.llm, len(ids), choices=n, usage=bool(options.get("include_usage")),
                progress=bool(options.get("include_progress")), first=number * n,
                echo=self.llm.detokenize(ids) if values["echo"] else "", scored=scored,
            )  # fmt: skip
            work.append((reply, ids, asked, n))
        if values["stream"]:
            return await self._stream(request, work, _openai_event, end="[DONE]")
        await self._collect(request, work)
        replies = [reply for reply, *_ in work]
        return JSONResponse(whole_completion(replies, logprobs=values["logprobs"] is not None))

    async def responses(self, request: Request) -> Response:
        values, ids, asked, calling = await self._prompt(response_prompt, request)
        reply = ResponseReply(self.llm, values, len(ids), calling)
        if values["stream"]:
            return await self._stream(request, [(reply, ids, asked, 1)], _typed_event)
        await self._collect(request, [(reply, ids, asked, 1)])
        return JSONResponse(reply.whole())

    async def messages(self, request: Request) -> Response:
        values, ids, asked, calling = await self._prompt(message_prompt, request)
        reply = MessageReply(self.llm, len(ids), calling)
        if values["stream"]:
            return await self._stream(request, [(reply, ids, asked, 1)], _typed_event)
        await self._collect(request, [(reply, ids, asked, 1)])
        return JSONResponse(reply.whole())

    async def count_tokens(self, request: Request) -> Response:
        data = await self._json(request)
        return JSONResponse(await asyncio.to_thread(counted_tokens, self.llm, data))

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _json(self, request: Request) -> Any:
        return await read_json(request, self.limits.body)

    async def _prompt(self, parse: Callable[[LLM, Any], Any], request: Request) -> Any:
        data = await self._json(request)
        return await asyncio.to_thread(parse, self.llm, data)

    def _submit(
        self, reply: Reply, ids: Sequence[int], asked: GenerationRequest, choices: int
    ) -> tuple[Job, asyncio.Queue[Event]]:
        """Queue a job whose events come out of a queue of this event loop. Raises ApiError."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def put(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        if len(ids) >= self.llm.ctx:
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens, the context holds {self.llm.ctx} with the answer; shorten it, "
                "or start the server with a larger --ctx", code="context_length_exceeded",
            )  # fmt: skip
        job = Job(ids, asked, put, choices, reply.progress)
        try:
            self.scheduler.submit(job)
        except Busy as error:
            raise ApiError(429, str(error), retry_after=error.seconds) from None
        except Stopping as error:
            raise ApiError(503, str(error), retry_after=_PING_S) from None
        except SlimrtError as error:
            raise ApiError(400, str(error)) from None
        return job, events

    def _submit_all(self, work: Work) -> list[tuple[Reply, Job, asyncio.Queue[Event]]]:
        """Queue all jobs, or none. Raises ApiError."""
        jobs: list[tuple[Reply, Job, asyncio.Queue[Event]]] = []
        try:
            for reply, ids, asked, choices in work:
                jobs.append((reply, *self._submit(reply, ids, asked, choices)))
        except ApiError:
            for _, job, _ in jobs:
                self.scheduler.cancel(job)
            raise
        return jobs

    async def _events(self, job: Job, events: asyncio.Queue[Event]) -> AsyncIterator[Event]:
        """A job's events up to the last. Raises ApiError."""
        deadline, before = job.came + self.limits.seconds, 0.0
        while True:
            try:
                event = await asyncio.wait_for(events.get(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise ApiError(504, f"the request took longer than {self.limits.seconds:g} s (--timeout)") from None
            if isinstance(event, Failed):
                if isinstance(event.error, Stopping):
                    raise ApiError(503, str(event.error), retry_after=_PING_S)
                if isinstance(event.error, SlimrtError):
                    raise ApiError(500, str(event.error))
                raise ApiError(500, "a defect of the server; its log tells more")
            if isinstance(event, Read):
                self.metrics.read(len(job.ids), event.reading)
            elif isinstance(event, Piece) and event.step.token is not None:
                now = time.monotonic()
                self.metrics.written.inc()
                if before:
                    self.metrics.between.observe(now - before)
                else:
                    self.metrics.first_token.observe(now - job.came)
                before = now
            yield event
            if isinstance(event, Ended):
                return

    async def _collect(self, request: Request, work: Work) -> None:
        """Run to the end, unless the client goes."""
        jobs = self._submit_all(work)

        async def run() -> None:
            for reply, job, events in jobs:
                async for event in self._events(job, events):
                    for _ in reply.take(event):
                        pass

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        running, leaving = asyncio.create_task(run()), asyncio.create_task(gone())
        try:
            await asyncio.wait((running, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise ClientDisconnect
            running.result()
        finally:
            for _, job, _ in jobs:
                self.scheduler.cancel(job)
            for task in (running, leaving):
                task.cancel()
            await asyncio.gather(running, leaving, return_exceptions=True)

    async def _stream(
        self, request: Request, work: Work, sent: Callable[[dict[str, Any]], ServerSentEvent], end: str | None = None
    ) -> Response:
        """Send what comes. What can be refused is refused here, with its status, before the stream begins."""
        anthropic = request.url.path.startswith("/v1/messages")
        jobs = self._submit_all(work)

        async def chunks() -> AsyncIterator[ServerSentEvent]:
            try:
                for reply, job, events in jobs:
                    async for event in self._events(job, events):
                        for chunk in reply.take(event):
                            yield sent(chunk)
                if end is not None:
                    yield ServerSentEvent(end, sep="\n")
            except ApiError as error:
                yield sent(error.body(anthropic=anthropic))
            finally:
                for _, job, _ in jobs:
                    self.scheduler.cancel(job)

        # When the server is told to stop, a stream ends by itself or by an event of the scheduler: the package is not
        # to cut it before.
        return EventSourceResponse(
            chunks(), ping=_PING_S, sep="\n", shutdown_event=anyio.Event(), shutdown_grace_period=self.limits.seconds
        )


def _openai_event(chunk: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(chunk, ensure_ascii=False), sep="\n")


def _typed_event(chunk: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(chunk, ensure_ascii=False), sep="\n", event=chunk.get("type", "error"))


def _encoding(llm: LLM, values: dict[str, Any]) -> dict[str, Any]:
    return {"special": values["parse_special"], "add_bos": values["add_special"] and llm.tokenizer.add_bos}


def create_app(llm: LLM, limits: Limits | None = None) -> Starlette:
    """The ASGI application that serves ``llm``; it computes in one thread of its own, which ends with the app."""
    limits = limits or Limits()
    server = _Server(llm, limits)

    async def guarded(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        path, anthropic = request.url.path, request.url.path.startswith("/v1/messages")
        try:
            if path not in _OPEN:
                check_caller(request, limits)
            if limits.key is not None and path not in _OPEN and not _has_key(request, limits.key):
                raise ApiError(401, "a wrong or missing API key; send Authorization: Bearer KEY, or x-api-key")
            response = await answer(request)
        except ApiError as error:
            headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
            response = JSONResponse(error.body(anthropic=anthropic), error.status, headers)
        except ClientDisconnect:
            response = Response(status_code=499)
        server.metrics.requests.labels(request.scope["route"].path, str(response.status_code)).inc()
        return response

    def route(path: str, answer: Callable[[Request], Awaitable[Response]], method: str) -> Route:
        async def handler(request: Request) -> Response:
            return await guarded(request, answer)

        return Route(path, handler, methods=[method])

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = ApiError(
            error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}; see /openapi.json"
        )
        body = told.body(anthropic=request.url.path.startswith("/v1/messages"))
        return JSONResponse(body, error.status_code, error.headers)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(server.scheduler.close)

    middleware = []
    if limits.origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(limits.origins), allow_methods=["*"], allow_headers=["*"])
        )
    app = Starlette(
        routes=[
            route("/", server.page, "GET"),
            route("/health", server.health, "GET"),
            route("/metrics", server.get_metrics, "GET"),
            route("/openapi.json", server.openapi, "GET"),
            route("/v1/models", server.models, "GET"),
            route("/v1/models/{name:path}", server.model, "GET"),
            route("/tokenize", server.tokenize, "POST"),
            route("/detokenize", server.detokenize, "POST"),
            route("/document", server.document, "POST"),
            route("/v1/embeddings", server.embeddings, "POST"),
            route("/v1/chat/completions", server.chat, "POST"),
            route("/v1/completions", server.completion, "POST"),
            route("/v1/responses", server.responses, "POST"),
            route("/v1/messages", server.messages, "POST"),
            route("/v1/messages/count_tokens", server.count_tokens, "POST"),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    app.state.scheduler = server.scheduler
    return app


def _has_key(request: Request, key: str) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip() or request.headers.get(
        "x-api-key", ""
    )
    return hmac.compare_digest(given.encode(), key.encode())
