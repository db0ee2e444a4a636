"""The Python interface: load a model, ask it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Union, Unpack, overload

import numpy as np

from slimrt import __version__
from slimrt.config import CacheConfig, ModelConfig, context_advice, is_whole
from slimrt.context import Progress
from slimrt.conversation import Conversation, fit_messages
from slimrt.drafting.drawing import check_draft
from slimrt.drafting.model import DraftModel, check_vocabulary
from slimrt.engine import Engine
from slimrt.errors import ContextError, SettingError, SlimrtError
from slimrt.library.store import Library, library_folder
from slimrt.memory import cuda as memory_cuda
from slimrt.memory.cuda import CudaPlan
from slimrt.memory.plan import DEFAULT_CTX, MemoryPlan, available_memory, largest_context
from slimrt.memory.plan import plan as plan_memory
from slimrt.models import build, read_config, stretch_rope
from slimrt.models.adapters import Adapter, read_adapter
from slimrt.ops.backend import Backend, check_device, find_gpu, open_backend, open_cuda, uses_kernels
from slimrt.ops.cuda.device import wants_gpu
from slimrt.paths import user_path
from slimrt.prune.asked import Asked
from slimrt.prune.plan import PrunePlan
from slimrt.prune.presets import PlanChoice, choose_plan
from slimrt.request import GenerateOptions, GenerationRequest, Overflow, check_overflow, request_from_options
from slimrt.results import Completion
from slimrt.session import Session
from slimrt.session_file import model_fingerprint
from slimrt.streaming import CompletionStream
from slimrt.text.asking import asking
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile

if TYPE_CHECKING:
    from slimrt.text.chat_template import ChatTemplate
    from slimrt.tools.calling import Calling, ToolStream
    from slimrt.tools.messages import ToolForm

__all__ = ["LLM", "load"]

log = logging.getLogger(__name__)

_LOGIT_ROWS = 256  # rows of [V] logits held at a time by logprobs

Prompt = str | Sequence[int]
Plan = PrunePlan | str | Path
Adapters = Sequence[str | Path | tuple[str | Path, float]]
Draft = Union[str, Path, "LLM", None]
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class ChatOptions(GenerateOptions, total=False):
    """The keyword arguments of ``LLM.chat``."""

    prune: Plan | None
    session: Session | None
    progress: Progress | None


class StreamOptions(ChatOptions, total=False):
    """The keyword arguments of ``LLM.generate``."""

    special: bool


def load(
    path: str | Path | None = None,
    *,
    ctx: int | None = None,
    device: str = "auto",
    prune: Plan = "auto",
    kv_budget: int | None = None,
    threads: int | None = None,
    rope_base: float | None = None,
    rope_scaling: str | None = None,
    rope_factor: float | None = None,
    chat_template: str | None = None,
    overflow: Overflow = "error",
    stream_weights: bool = False,
    cache: bool | str | Path = False,
    draft: Draft = "auto",
    lora: Adapters = (),
    progress: Progress | None = None,
) -> LLM:
    """Open a GGUF model.

    ``path``: a file, "hf:owner/repo/file.gguf", or None for the default model, fetched where needed. ``ctx``: the most
    tokens of a conversation (default: the trained context, at most 8192); past the trained context RoPE is stretched
    by YaRN unless ``rope_scaling`` says "none" or "linear". ``device``: "auto" (a GPU where one works, else the CPU),
    "cuda", "cpu" (compiled kernels where Numba is installed and the processor allows), "numpy" (the slower reference).
    ``kv_budget``: rows of each layer's KV cache that stay resident and that decode reads (default: all); the rest lies
    in host memory.
    ``threads``: cores to use (default: all that the process may). ``chat_template``: a Jinja template or the name of a
    built-in one, in place of the file's. ``overflow``: when the context is full, "error" ends the text or refuses the
    prompt, "shift" drops the oldest turns or text and says so in the timings. ``stream_weights``: keep the layers'
    weights in host memory and bring each to the GPU one layer ahead, for models that exceed it; decoding is slow then.
    ``cache``: keep what is read of long prompts on disk (True: in the user's cache folder, or a folder), so that a
    later process need not read it again; not under a ``kv_budget``.
    ``draft``: how next tokens are guessed, so that several are read at once; the text is the same. "auto": by what
    stood behind the same words before, where that costs nothing (compiled kernels); "lookup": wherever it works; a
    path (or LLM): by a smaller model of the same vocabulary; "off" or None: not at all.
    ``lora``: adapters to apply: GGUF files, or (file, scale); ``LLM.set_adapters`` changes them later. On the CPU.
    ``progress`` is called with (layers loaded, layers).

    Raises ModelFileError for an unusable file, SettingError for options out of range.
    """
    from slimrt.hub.store import resolve

    file = GGUFFile(resolve(path))
    return LLM(
        file,
        ctx=ctx,
        device=device,
        prune=prune,
        kv_budget=kv_budget,
        threads=threads,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        rope_factor=rope_factor,
        chat_template=chat_template,
        overflow=overflow,
        stream_weights=stream_weights,
        cache=cache,
        draft=draft,
        lora=lora,
        progress=progress,
    )


class LLM:
    """A loaded model and one running conversation.

    ``config`` (sizes), ``tokenizer``, ``ctx``, ``file`` (metadata), ``backend`` (what computes, and why), ``memory``
    (its plan), ``notes`` (what was decided at load and is worth saying, such as a stretched context).

    Several threads, and a program's event loop, may use one LLM: ``generate`` and ``chat`` run one after the other;
    a stream whose conversation was moved on by another call since raises SettingError, for that each needs a
    ``session()`` of its own. ``with slimrt.load(...) as llm`` or ``close()`` gives the memory back; so does dropping
    the last reference to the LLM and its sessions.
    """

    def __init__(
        self,
        file: GGUFFile,
        *,
        ctx: int | None = None,
        device: str = "auto",
        prune: Plan = "auto",
        kv_budget: int | None = None,
        threads: int | None = None,
        rope_base: float | None = None,
        rope_scaling: str | None = None,
        rope_factor: float | None = None,
        chat_template: str | None = None,
        overflow: Overflow = "error",
        stream_weights: bool = False,
        cache: bool | str | Path = False,
        draft: Draft = "auto",
        lora: Adapters = (),
        progress: Progress | None = None,
    ) -> None:
        self.file = file
        config = read_config(file)
        self.ctx = min(config.ctx_train, DEFAULT_CTX) if ctx is None else ctx
        for name, value in (("ctx", self.ctx), ("threads", threads)):
            if value is not None and not (is_whole(value) and value >= 1):
                raise SettingError(f"{name} {value!r}: must be a whole number, at least 1")
        self.kv_budget = kv_budget
        kv = CacheConfig(self.ctx, kv_budget)
        check_device(device)
        check_overflow(overflow)
        self.overflow = overflow
        self.notes: list[str] = []
        self.config: ModelConfig = stretch_rope(
            config, self.ctx, base=rope_base, scaling=rope_scaling, factor=rope_factor
        )
        if self.config.rope.scaling == "yarn" and config.rope.scaling == "none" and rope_scaling is None:
            self.notes.append(
                f"context {self.ctx} exceeds the {config.ctx_train} that the model was trained on: RoPE is stretched "
                f"{self.config.rope.factor:g}x by YaRN (rope_scaling='none' switches that off)"
            )
        self.tokenizer = Tokenizer.from_gguf(file)
        self.plan = choose_plan(prune, file, self.config)
        self._chat_template = chat_template
        self._template: ChatTemplate | None = None
        self._tool_form: ToolForm | None = None
        self.memory: MemoryPlan | CudaPlan
        backend = self._gpu(device, kv, stream_weights)
        if backend is None and stream_weights:
            raise SettingError(
                "stream_weights: weights are streamed to a GPU, this runs on the CPU; leave it out or use device='cuda'"
            )
        if backend is None:
            device = "numpy" if device == "numpy" else "cpu"
            fast = uses_kernels(device)
            how: Any = {"threads": threads, "fast": fast, "kv_budget": kv_budget}
            self.memory = memory = plan_memory(self.config, file, self.ctx, **how)
            if not memory.fits():
                raise SettingError(_does_not_fit(memory, largest_context(self.config, file, self.ctx, **how)))
            if memory.packed and not fast:
                self.notes.append(
                    "weights stay packed: unpacked they would take more than half of the free memory; "
                    "expect slow decoding"
                )
            backend = open_backend(device, threads=threads, packed=memory.packed)
            if device == "cpu" and not fast:
                self.notes.append(f"computing with {backend.why}")
        self.backend = backend
        for text in self.notes:
            log.info("%s: %s", config.name, text)
        log.info(
            "%s loaded: context %d, %s, prompts by plan %s, at most %.2f GiB",
            config.name, self.ctx, backend.why, self.plan.source, self.memory.total / 2**30,
        )  # fmt: skip
        self._read_adapters: dict[Path, tuple[tuple[int, int], Adapter]] = {}  # with what tells that a file changed
        adapters = self._adapters(lora)  # whatever can be refused is refused before the weights are read
        self._engine = Engine(build(self.config, file, backend.ops, progress, stream=stream_weights), backend.ops, kv)
        # Which tokens of a prompt ask (slimrt.text.asking). Sessions hold it: it must not hold the model.
        self.asking: Callable[[Sequence[int]], Asked] = partial(asking, self.tokenizer)
        self._library: Path | None = None
        if cache is not False and kv_budget is None:
            self._library = library_folder() if cache is True else user_path(cache)
        self._session = Session(self._engine, self.ctx, self.asking)
        self._apply(adapters)
        self._engine.draft = self._drafter(draft, threads)
        check_draft(GenerationRequest(), self._session)

    def _drafter(self, draft: Draft, threads: int | None) -> Any:
        """What ``Engine.draft`` takes. Raises SettingError for a draft model of another vocabulary, or without room."""
        if draft in (None, "off", "auto", "lookup"):
            return None if draft == "off" else draft
        if isinstance(draft, LLM):
            check_vocabulary(self.tokenizer, draft.tokenizer, draft.config.name)
            return DraftModel(draft.engine, draft.ctx, draft.config.name)
        from slimrt.hub.store import resolve

        file = GGUFFile(resolve(draft))
        config = read_config(file)
        check_vocabulary(self.tokenizer, Tokenizer.from_gguf(file), config.name)
        ctx, ops = min(self.ctx, config.ctx_train), self.backend.ops
        if ops.name != "cuda":
            memory = plan_memory(config, file, ctx, threads=threads, fast=ops.name == "fast", kv_budget=None)
            if not memory.fits():
                raise SettingError(f"draft model {config.name}: {_does_not_fit(memory, 0)}")
        return DraftModel(Engine(build(config, file, ops), ops), ctx, config.name)

    def set_adapters(self, adapters: Adapters) -> None:
        """Apply these LoRA adapters (GGUF files, or (file, scale); times 1) in the place of those before; empty: none.

        They hold for all sessions, between calls: a text that is being written ends with SettingError at its next
        token. What was read under others is read again. A file is read once, and again when it has changed.

        Raises ModelFileError for a file that is no adapter for this model, SettingError for a scale that is no finite
        number or a GPU; the adapters are then those before.
        """
        found = self._adapters(adapters)
        with self._session.lock:
            self._apply(found)

    def _apply(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self._engine.model.adapt(adapters)
        if self._library is not None:
            self._engine.library = Library(self._library, self._bits())

    def _adapters(self, adapters: Adapters) -> list[tuple[Adapter, float]]:
        """The adapters of these files with their scales. Raises as ``set_adapters`` does."""
        pairs = _pairs(adapters)
        if pairs and self.backend.ops.name == "cuda":
            raise SettingError("lora: adapters are applied on the CPU only; leave them out, or load with device='cpu'")
        found = []
        for given, scale in pairs:
            path = user_path(given)
            version = (0, 0)
            if path.exists():  # else reading it says what is wrong
                status = path.stat()
                version = status.st_mtime_ns, status.st_size
            held, adapter = self._read_adapters.get(path, (None, None))
            if adapter is None or held != version:
                adapter = read_adapter(path, self.config, available_memory())
                self._read_adapters[path] = version, adapter
            found.append((adapter, scale))
        return found

    def _bits(self) -> str:
        """All that decides the bits of what is read: of the same weights, read in the same way, it is the same."""
        ops = self.backend.ops
        status = [(found.st_size, found.st_mtime_ns) for found in (path.stat() for path in self.file.paths)]
        kind = np.dtype(ops.kv_type).str, getattr(ops, "features", None)
        fingerprint = model_fingerprint(self.file, self._engine.adapters)
        return repr((__version__, fingerprint, status, self.config.rope, ops.name, *kind))

    def _gpu(self, device: str, cache: CacheConfig, stream: bool) -> Backend | None:
        """The GPU, opened, with ``memory`` its plan; None for the CPU, and a note if a GPU is there but not used.

        Raises DeviceError or SettingError where the GPU was asked for by name and cannot be used.
        """
        gpu, why = find_gpu(device)
        if gpu is not None:
            self.memory, problem = memory_cuda.fit(self.config, self.file, cache, gpu, stream=stream)
            try:
                if problem is None:
                    return open_cuda(gpu, keeps_unpacked=self.memory.keeps)
                raise SettingError(problem)
            except SlimrtError as error:
                if device == "cuda":
                    raise
                why = str(error)
        if device == "auto" and wants_gpu():
            self.notes.append(f"computing on the CPU: {why}")
        return None

    @property
    def engine(self) -> Engine:
        """The model on its backend, without any conversation: for measurements that go below a prompt."""
        return self._engine

    def _plan(self, prune: Plan | None) -> PrunePlan | None:
        """The plan of one call: its own, or the one chosen at load."""
        return self._choice(prune).plan

    def _choice(self, prune: Plan | None) -> PlanChoice:
        return self.plan if prune is None else choose_plan(prune, self.file, self.config)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """``text`` -> token ids, with the begin token if the model wants one; control tokens count if ``special``."""
        return self.tokenizer.encode(text, special=special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Token ids -> text; control tokens are shown only if ``special``, incomplete UTF-8 becomes U+FFFD."""
        return self.tokenizer.decode(ids, special=special)

    def token_ids(self, prompt: Prompt, special: bool = False) -> list[int]:
        """``prompt`` as token ids. Raises SettingError for what is neither a text nor a list of this model's ids."""
        if isinstance(prompt, str):
            return self.tokenize(prompt, special)
        if isinstance(prompt, (bytes, bytearray, memoryview, Mapping)) or not hasattr(prompt, "__iter__"):
            raise SettingError(
                f"prompt of type {type(prompt).__name__}: must be a text or a list of token ids; decode bytes first"
            )
        ids = list(prompt)
        size = self.config.vocab_size
        for at, token in enumerate(ids):
            if type(token) is not int:
                if not is_whole(token):
                    raise SettingError(
                        f"prompt: item {at} is {str(token)[:40]!r}; a prompt is one text, or a list of token ids"
                    )
                ids[at] = token = int(token)
            if not 0 <= token < size:
                raise SettingError(f"prompt: item {at} is the token id {token}; this model has ids 0 to {size - 1}")
        return ids

    # -- logits -----------------------------------------------------------------------------------------------------

    def logits(self, ids: Sequence[int], *, prune: Plan | None = None) -> np.ndarray:
        """Next-token logits [V] float32 after ``ids``, by a prefill of its own (the running conversation stays)."""
        plan = self._plan(prune)
        session = Session(self._engine, self.ctx, self.asking)
        session.prefill(self.token_ids(ids), plan)
        assert session.logits is not None
        return session.logits

    def logprobs(
        self, ids: Sequence[int], start: int, *, prune: Plan | None = None, decode: bool = False
    ) -> np.ndarray:
        """log p(ids[i] | ids[:i]) for i >= ``start`` -> float32 [len(ids) - start].

        ``ids[:start]`` is the (pruned) prompt; the rest is read as one piece, which rounds less than decode does, or
        (``decode``) a token at a time, exactly as if it had been generated. Raises SettingError unless
        1 <= start <= len(ids), ContextError if the ids exceed the context.
        """
        ids = self.token_ids(ids)
        result, at = np.empty(max(0, len(ids) - start), np.float32), 0
        for block in self._continuation(ids, start, prune, decode):
            result[at : at + len(block)] = _logprobs(block, ids[start + at : start + at + len(block)])
            at += len(block)
        return result

    def continuation_logits(
        self, ids: Sequence[int], start: int, *, prune: Plan | None = None, decode: bool = False
    ) -> np.ndarray:
        """The logits behind ``logprobs``: row i [V] predicts ids[start + i] -> float32 [len(ids) - start, V]."""
        blocks = list(self._continuation(self.token_ids(ids), start, prune, decode))
        return np.concatenate(blocks) if blocks else np.empty((0, self.config.vocab_size), np.float32)

    def _continuation(self, ids: list[int], start: int, prune: Plan | None, decode: bool) -> Iterator[np.ndarray]:
        """Logits [rows, V] that predict ids[start:], a bounded number of rows at a time."""
        if not 1 <= start <= len(ids):
            raise SettingError(f"start {start}: must lie in 1..{len(ids)}, the first token has nothing before it")
        if len(ids) > self.ctx:
            raise ContextError(
                f"{len(ids)} tokens, the context holds {self.ctx}; {context_advice(len(ids), self.config.ctx_train)}"
            )
        plan = self._plan(prune)
        if start == len(ids):
            return
        session = Session(self._engine, self.ctx, self.asking)
        session.prefill(ids[:start], plan)
        assert session.logits is not None
        yield session.logits[None]
        rest = ids[start:-1]
        if decode or self.kv_budget is not None:  # the budget holds in decode only, a token at a time
            for token in rest:
                yield self._engine.decode_one_token(session.context, token)[None]
        elif rest:
            hidden = self._engine.extend(session.context, rest, wanted=len(rest))
            for lo in range(0, len(hidden), _LOGIT_ROWS):
                yield self._engine.logits(hidden[lo : lo + _LOGIT_ROWS])

    # -- embeddings -------------------------------------------------------------------------------------------------

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: Literal["mean", "last", "cls"] = "mean",
        normalize: bool = True,
    ) -> np.ndarray:
        """One vector a text, of the hidden states behind the output norm -> float32 [n, D].

        ``texts``: a text, token ids, or a list of either. ``pooling``: the mean over a text's tokens, its last
        token's, or its first one's ("cls", for models that are trained so). ``normalize``: vectors of length 1. Texts
        are read whole (no plan), each from an empty context. Raises SettingError for what is no text, ContextError for
        an empty text and one that exceeds the context.
        """
        if pooling not in ("mean", "last", "cls"):
            raise SettingError(f"pooling {pooling!r}: must be 'mean', 'last' or 'cls' (the first token)")
        single = isinstance(texts, str) or all(is_whole(item) for item in texts)
        prompts = [self.token_ids(text) for text in ([texts] if single else texts)]  # type: ignore[arg-type]
        for ids in prompts:
            self._session.check(ids)
        vectors = np.empty((len(prompts), self.config.d_model), np.float32)
        context = self._engine.new_context()
        try:
            for vector, ids in zip(vectors, prompts, strict=True):
                states, _ = self._engine.prefill(context, ids, wanted=1 if pooling == "last" else len(ids))
                states = states[:1] if pooling == "cls" else states
                vector[:] = self._engine.last_states(states).mean(axis=0, dtype=np.float64)
                context.truncate(0)
        finally:
            context.cache.close()
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return vectors

    def token_states(self, ids: Sequence[int]) -> np.ndarray:
        """The hidden states behind the output norm of each of ``ids``, from an empty context -> float32 [T, D].

        Raises as ``embed`` does."""
        ids = self.token_ids(ids)
        self._session.check(ids)
        context = self._engine.new_context()
        try:
            return self._engine.last_states(self._engine.prefill(context, ids, wanted=len(ids))[0])
        finally:
            context.cache.close()

    # -- generation -------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: Prompt,
        *,
        prune: Plan | None = None,
        special: bool = False,
        session: Session | None = None,
        progress: Progress | None = None,
        **options: Unpack[GenerateOptions],
    ) -> CompletionStream:
        """Generate after ``prompt``: an iterator of pieces of text, with ``.completion`` and ``.close()``.

        Options: ``max_tokens`` (128; None: up to the context), ``stop`` (a string or several), ``seed``,
        ``temperature`` (0: greedy), ``top_k``, ``top_p``, ``min_p``, ``typical_p``, ``top_n_sigma``,
        ``xtc_probability``, ``xtc_threshold``, ``dynatemp_range``, ``dynatemp_exponent``, ``mirostat`` (1 or 2),
        ``mirostat_tau``, ``mirostat_eta``, ``dry_multiplier``, ``dry_base``, ``dry_allowed_length``,
        ``dry_penalty_last_n``, ``dry_sequence_breakers``, ``repeat_penalty``, ``presence_penalty``,
        ``frequency_penalty``, ``penalty_last_n``, ``logit_bias``, ``logits_processors`` (callables (ids, logits) ->
        logits), ``logprobs`` (how many alternatives), ``ignore_eos``;
        ``schema`` (a JSON schema) or ``grammar`` (a ``slimrt.Grammar``, GBNF
        or Lark), which the answer then matches:
        ``completion.complete`` tells whether it is whole; ``draft`` ("lookup" or None, in place of what was chosen at
        load). ``special``: control tokens in a text prompt count as such.
        ``progress`` is called with (layers done, layers) during prefill.
        ``overflow`` "shift": when the context fills up while the text is written, its first ``n_keep`` tokens (4) stay,
        the older half of the others is dropped, and what is left is read anew; the timings say so.
        """
        request = self.request(options)
        return self.begin(self.token_ids(prompt, special), request, prune=prune, session=session, progress=progress)

    def request(self, options: GenerateOptions) -> GenerationRequest:
        """The options of ``stream`` checked, with what was chosen at load where they say nothing."""
        return request_from_options(self.overflow, options)

    def begin(
        self,
        ids: Sequence[int],
        request: GenerationRequest,
        *,
        prune: Plan | None = None,
        session: Session | None = None,
        progress: Progress | None = None,
        note: str = "",
        on_end: Callable[[str], None] | None = None,
    ) -> CompletionStream:
        """Read ``ids`` and return the stream of the text after it; ``note``, ``on_end``: see CompletionStream."""
        plan = self._plan(prune)
        return CompletionStream(
            session or self._session, self.tokenizer, ids, request, plan, progress, note=note, on_end=on_end
        )

    def generate(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> Completion:
        """Generate after ``prompt`` and return the whole; options as for ``stream``."""
        return self.stream(prompt, **options).finished()

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None,
        stream: Literal[True],
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        **options: Unpack[ChatOptions],
    ) -> ToolStream | CompletionStream: ...
    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> CompletionStream: ...
    def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        stream: bool = False,
        prune: Plan | None = None,
        session: Session | None = None,
        progress: Progress | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion | CompletionStream:
        """Answer ``messages`` ([{"role": ..., "content": ...}, ...]) through the model's chat template.

        Options as for ``stream``. With ``overflow`` "shift" the oldest turns are left out where the context has no room
        for them and an answer.

        ``tools``: what the answer may call, as OpenAI has it ({"type": "function", "function": {"name": ...,
        "description": ..., "parameters": JSON schema}}) or the inner part alone; the arguments of a call fit its
        schema. ``tool_choice``: "auto" (text, or text and calls), "none", "required", or {"type": "function",
        "function": {"name": ...}}. ``parallel_tool_calls`` False: one call at most. The calls are
        ``completion.tool_calls``; they go into ``messages`` as {"role": "assistant", "content": completion.text,
        "tool_calls": [call.as_openai() for call in ...]}, and a result as {"role": "tool", "tool_call_id": ...,
        "content": ...}. A stream then has ``deltas()`` beside the pieces of text.
        """
        calling = self.calling(tools, tool_choice, parallel_tool_calls)
        request = self.request(options)
        request = request if calling is None else calling.bind(request)
        fitted = fit_messages(partial(self.chat_tokens, calling=calling), messages, self.ctx, request)
        if calling is None:
            answer = self.begin(
                fitted.ids, fitted.request, prune=prune, session=session, progress=progress, note=fitted.note
            )
        else:
            from slimrt.tools.calling import ToolStream

            answer = ToolStream(
                calling, session or self._session, self.tokenizer, fitted.ids, fitted.request, self._plan(prune),
                progress, note=fitted.note,
            )  # fmt: skip
        return answer if stream else answer.finished()

    def calling(self, tools: Any, tool_choice: Any = None, parallel: bool | None = None) -> Calling | None:
        """How an answer may call ``tools``, as ``chat`` takes them; None where it may call nothing.

        Raises SettingError for tools that are none or not supported, and for a choice of what is not there."""
        if not tools and tool_choice in (None, "none", "auto"):
            return None
        from slimrt.tools.calling import Calling

        return Calling.of(self.tool_form, self.tokenizer, tools, tool_choice, parallel)

    @property
    def tool_form(self) -> ToolForm:
        """How the model's chat template has tools and calls."""
        if self._tool_form is None:
            from slimrt.tools.messages import ToolForm

            self._tool_form = form = ToolForm.of(self.chat_template)
            log.info(
                "tools: calls in the form %s%s", form.format.name,
                "" if form.native else ", asked for in words: the chat template has no place for tools or its form is "
                "not known",
            )  # fmt: skip
        return self._tool_form

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` works: there is a template in the file, or one was given at load."""
        return bool(self._chat_template or self.tokenizer.chat_template)

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template, or the one given at load. Raises SettingError if there is none."""
        if self._template is None:
            from slimrt.text.chat_template import (
                ChatTemplate,  # jinja2 takes a while to import, and plain completion needs none
            )

            self._template = ChatTemplate.from_tokenizer(self.tokenizer, self._chat_template)
        return self._template

    def chat_tokens(self, messages: Messages, calling: Calling | None = None) -> list[int]:
        """``messages`` as the model reads them; control tokens count in the chat template, and are text in messages.

        ``calling``: the tools that the answer may call."""
        from slimrt.tools.messages import has_calls

        listed = isinstance(messages, Sequence) and not isinstance(messages, str)
        if calling is None and not (listed and has_calls(messages)):
            return self.chat_template.tokens(messages, self.tokenizer)
        tools = () if calling is None else calling.listed
        return self.tool_form.prompt(self.chat_template, self.tokenizer, messages, tools)

    # -- conversations -----------------------------------------------------------------------------------------------

    def session(
        self, *, system: str | None = None, prune: Plan | None = None, overflow: Overflow | None = None
    ) -> Conversation:
        """A conversation of its own on the same weights: ``with llm.session() as s: s.ask("...")``.

        ``system``: the system message. ``prune``, ``overflow``: as chosen at load unless given. The preset "auto" cuts
        nothing in a conversation, so that further questions cost little (``PlanChoice.lasting``).
        """
        return Conversation(
            self, self._engine, system=system, plan=self._choice(prune).lasting, overflow=overflow or self.overflow
        )

    def restore(self, path: str | Path, *, overflow: Overflow | None = None) -> Conversation:
        """The conversation that ``Conversation.save`` wrote to ``path``, with its messages and its plan.

        It goes on exactly as the saved one would have. Raises SessionFileError for a file that is damaged, no session,
        another model's, or of other RoPE settings.
        """
        conversation = self.session(overflow=overflow)
        conversation.load(path)
        return conversation

    @property
    def current(self) -> Session:
        """The running conversation that ``generate``, ``stream`` and ``chat`` share."""
        return self._session

    def reset(self) -> None:
        """Forget the running conversation."""
        self._session.reset()

    def close(self) -> None:
        """Give the memory of the model and its running conversation back; using it, or a session of it, raises
        SettingError from then on. Closing twice is closing once."""
        with self._session.lock:
            self._session.release()
            self._engine.close()
        self.backend.ops.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _pairs(adapters: Adapters) -> list[tuple[str | Path, float]]:
    """Files with their scales. Raises SettingError for anything but a list of files, or of (file, finite scale)."""
    if isinstance(adapters, (str, bytes, Path)) or not isinstance(adapters, Sequence):
        raise SettingError(f"lora {str(adapters)[:80]!r}: must be a list of files, or of (file, scale)")
    pairs = []
    for one in adapters:
        pair = one if isinstance(one, tuple) else (one, 1.0)
        if len(pair) != 2 or not isinstance(pair[0], (str, Path)):
            raise SettingError(f"adapter {str(one)[:80]!r}: must be a file, or (file, scale)")
        path, scale = pair
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise SettingError(f"adapter {str(path)[:80]}: scale {str(scale)[:40]}; must be a finite number, as 0.5")
        pairs.append((path, float(scale)))
    return pairs


def _does_not_fit(plan: MemoryPlan, room: int) -> str:
    """The refusal of a memory plan; ``room`` is the largest context that would fit."""
    assert plan.available is not None
    remedy = f"a context of {room} fits (ctx={room}, --ctx {room})" if room else "use a smaller model or quantisation"
    return (
        f"the model needs {plan.total / 2**30:.1f} GiB at a context of {plan.ctx} (weights {plan.weights / 2**30:.1f}, "
        f"KV cache {(plan.kv + plan.kv_host) / 2**30:.1f}, hidden states {plan.boundary / 2**30:.1f}, "
        f"scratch {plan.scratch / 2**30:.1f}, interpreter and libraries {plan.runtime / 2**30:.1f}), "
        f"{plan.available / 2**30:.1f} GiB are free; {remedy}"
    )


def _logprobs(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """logits [T, V], tokens [T] -> log-softmax at the tokens [T] float32."""
    peak = logits.max(axis=1)
    total = np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64)
    return (logits[np.arange(len(tokens)), list(tokens)] - peak - np.log(total)).astype(np.float32)
