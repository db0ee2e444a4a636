"""The Python interface: a loaded model, and what it can be asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack, overload

import numpy as np

from slimrt import __version__
from slimrt.adapter_files import AdapterFiles
from slimrt.ask_options import ChatOptions, Messages, Prompt, StreamOptions, Tools
from slimrt.config import Overflow, is_whole
from slimrt.context import Progress
from slimrt.conversation import Conversation, fit_messages
from slimrt.drafting.drawing import check_draft
from slimrt.drafting.model import DraftModel, check_vocabulary
from slimrt.embedding import Pooling, check_pooling, embedded, states_of
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.library.store import Library, library_folder
from slimrt.load_options import Adapters, Draft, LoadOptions, Plan
from slimrt.models import build
from slimrt.models.adapters import Adapter, adapters_name
from slimrt.opening import Opened, open_draft
from slimrt.paths import user_path
from slimrt.prune.asked import Asked
from slimrt.prune.plan import PrunePlan
from slimrt.prune.presets import PlanChoice, choose_plan
from slimrt.request import GenerateOptions, GenerationRequest, request_from_options
from slimrt.results import Completion
from slimrt.scoring import continuation_logits, token_logprobs
from slimrt.session import Session
from slimrt.session_file import model_fingerprint
from slimrt.streaming import CompletionStream
from slimrt.text.asking import asking
from slimrt.text.ids import checked_ids
from slimrt.text.tokenizer import Tokenizer
from slimrt.tools.reading import MessageReader
from slimrt.weights.gguf import GGUFFile

if TYPE_CHECKING:
    from slimrt.text.chat_template import ChatTemplate
    from slimrt.tools.calling import Calling
    from slimrt.tools.messages import ToolForm

__all__ = ["LLM"]

log = logging.getLogger(__name__)


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
        self, file: GGUFFile, options: LoadOptions | None = None, *, progress: Progress | None = None
    ) -> None:  # fmt: skip
        self.options = options = options or LoadOptions()
        self.file, self.overflow, self.kv_budget = file, options.overflow, options.kv_budget
        opened = Opened(file, options)
        self.ctx, self.config, self.notes = opened.ctx, opened.config, opened.notes
        self.backend, self.memory = opened.backend, opened.memory
        self.tokenizer = Tokenizer.from_gguf(file)
        self._messages = MessageReader(self.tokenizer, options.chat_template)
        ops = self.backend.ops
        self._adapter_files = AdapterFiles(self.config, ops)
        adapters = self._adapter_files.read(options.lora)  # what can be refused is refused before weights are read
        self.plan = choose_plan(options.prune, file, self.config, adapters_name(adapters))
        for text in self.notes:
            log.info("%s: %s", self.config.name, text)
        log.info(
            "%s loaded: context %d, %s, prompts by plan %s, at most %.2f GiB",
            self.config.name, self.ctx, self.backend.why, self.plan.source, self.memory.total / 2**30,
        )  # fmt: skip
        model = build(self.config, file, ops, progress, stream=options.stream_weights)
        self._engine = Engine(model, ops, opened.cache)
        # Which tokens of a prompt ask (slimrt.text.asking). Sessions hold it: it must not hold the model.
        self.asking: Callable[[Sequence[int]], Asked] = partial(asking, self.tokenizer)
        self._library: Path | None = None
        if options.keeps_documents:
            self._library = library_folder() if isinstance(options.cache, bool) else user_path(options.cache)
        self._session = Session(self._engine, self.ctx, self.asking)
        self._apply(adapters, self.plan)
        self._engine.draft = self._drafter(options.draft)
        check_draft(GenerationRequest(), self._session)

    def _drafter(self, draft: Draft) -> Any:
        """What ``Engine.draft`` takes. Raises SettingError for a draft model of another vocabulary, or without room."""
        if draft is None or (isinstance(draft, str) and draft in ("off", "auto", "lookup")):
            return None if draft == "off" else draft
        if isinstance(draft, LLM):
            check_vocabulary(self.tokenizer, draft.tokenizer, draft.config.name)
            return DraftModel(draft.engine, draft.ctx, draft.config.name)
        return open_draft(draft, self.tokenizer, self.ctx, self.backend, self.options.threads)  # type: ignore[arg-type]

    def set_adapters(self, adapters: Adapters) -> None:
        """Apply these LoRA adapters (GGUF files, or (file, scale); times 1) in the place of those before; empty: none.

        They hold for all sessions, between calls: a text that is being written ends with SettingError at its next
        token. What was read under others is read again. A file is read once, and again when it has changed.

        Raises ModelFileError for a file that is no adapter for this model, SettingError for a scale that is no finite
        number, a GPU, or a plan chosen at load that was calibrated under others; the adapters are then those before.
        """
        found = self._adapter_files.read(adapters)
        plan = choose_plan(self.options.prune, self.file, self.config, adapters_name(found))
        with self._session.lock:
            self._apply(found, plan)

    def _apply(self, adapters: Sequence[tuple[Adapter, float]], choice: PlanChoice) -> None:
        self.plan = choice
        self._engine.model.adapt(adapters)
        if self._library is not None:
            # A preset asks for the best that is quick; who gives a plan of his own gets its cuts.
            plan = choice.plan if choice.preset else None
            self._engine.library = Library(self._library, self._bits(), plan=plan)

    def _bits(self) -> str:
        """All that decides the bits of what is read: of the same weights, read in the same way, it is the same."""
        ops = self.backend.ops
        status = [(found.st_size, found.st_mtime_ns) for found in (path.stat() for path in self.file.paths)]
        kind = np.dtype(ops.kv_type).str, getattr(ops, "features", None)
        fingerprint = model_fingerprint(self.file, self._engine.adapters)
        return repr((__version__, fingerprint, status, self.config.rope, ops.name, *kind))

    @property
    def engine(self) -> Engine:
        """The model on its backend, without any conversation: for measurements that go below a prompt."""
        return self._engine

    def _plan(self, prune: Plan | None) -> PrunePlan | None:
        """The plan of one call: its own, or the one chosen at load."""
        return self._choice(prune).plan

    def _choice(self, prune: Plan | None) -> PlanChoice:
        return self.plan if prune is None else choose_plan(prune, self.file, self.config, self._engine.adapters)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """``text`` -> token ids, with the begin token if the model wants one; control tokens count if ``special``."""
        if not isinstance(text, str):
            raise SettingError(f"text of type {type(text).__name__}: must be a str; decode bytes first")
        return self.tokenizer.encode(text, special=special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Token ids -> text; control tokens are shown only if ``special``, incomplete UTF-8 becomes U+FFFD."""
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise SettingError(f"ids {str(ids)[:40]!r}: must be a list of token ids")
        ids = list(ids)
        for id in ids:
            if not is_whole(id):
                raise SettingError(f"token id {str(id)[:40]!r}: must be a whole number")
        return self.tokenizer.decode(ids, special=special)

    def token_ids(self, prompt: Prompt, special: bool = False) -> list[int]:
        """``prompt`` as token ids. Raises SettingError for what is neither a text nor a list of this model's ids."""
        if isinstance(prompt, str):
            return self.tokenize(prompt, special)
        return checked_ids(prompt, self.config.vocab_size)

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
        blocks = self._continuation(ids, start, prune, decode)
        result, at = np.empty(max(0, len(ids) - start), np.float32), 0
        for block in blocks:
            result[at : at + len(block)] = token_logprobs(block, ids[start + at : start + at + len(block)])
            at += len(block)
        return result

    def continuation_logits(
        self, ids: Sequence[int], start: int, *, prune: Plan | None = None, decode: bool = False
    ) -> np.ndarray:
        """The logits behind ``logprobs``: row i [V] predicts ids[start + i] -> float32 [len(ids) - start, V]."""
        blocks = list(self.continuation_blocks(ids, start, prune=prune, decode=decode))
        return np.concatenate(blocks) if blocks else np.empty((0, self.config.vocab_size), np.float32)

    def continuation_blocks(
        self, ids: Sequence[int], start: int, *, prune: Plan | None = None, decode: bool = False
    ) -> Iterator[np.ndarray]:
        """The rows of ``continuation_logits``, some hundred at a time."""
        return self._continuation(self.token_ids(ids), start, prune, decode)

    def _continuation(self, ids: list[int], start: int, prune: Plan | None, decode: bool) -> Iterator[np.ndarray]:
        if not is_whole(start):
            raise SettingError(f"start {start!r}: must be a whole number, the index of the first token that is judged")
        plan = self._plan(prune)
        return continuation_logits(self._engine, self.ctx, ids, start, plan, asking=self.asking, decode=decode)

    # -- embeddings -------------------------------------------------------------------------------------------------

    def embed(
        self,
        texts: Prompt | Iterable[Prompt],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """One vector a text, of the hidden states behind the output norm -> float32 [n, D].

        ``texts``: a text, token ids, or a list of either. ``pooling``: the mean over a text's tokens, its last
        token's, or its first one's ("cls", for models that are trained so). ``normalize``: vectors of length 1. Texts
        are read whole (no plan), each as from an empty context; with compiled kernels short ones pass together, and
        give the vectors that they give alone, bit for bit. ``progress`` is called with (texts done, texts). Raises
        SettingError for what is no text, ContextError for an empty text and one that exceeds the context.
        """
        check_pooling(pooling)
        if isinstance(texts, Iterator):
            texts = list(texts)  # it is gone through twice
        single = isinstance(texts, str) or not isinstance(texts, Iterable) or all(is_whole(item) for item in texts)
        prompts = [self.token_ids(text) for text in ([texts] if single else texts)]  # type: ignore[arg-type]
        for ids in prompts:
            self._session.check(ids)
        return embedded(self._engine, prompts, pooling, normalize=normalize, progress=progress)

    def token_states(self, ids: Sequence[int]) -> np.ndarray:
        """The hidden states behind the output norm of each of ``ids``, from an empty context -> float32 [T, D].

        Raises as ``embed`` does."""
        ids = self.token_ids(ids)
        self._session.check(ids)
        return states_of(self._engine, ids)

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
        the older half of the others is dropped, and what is left is read again; the timings say so.
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
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> CompletionStream: ...
    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> Completion: ...
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
        return self._messages.calling(tools, tool_choice, parallel)

    @property
    def tool_form(self) -> ToolForm:
        """How the model's chat template has tools and calls."""
        return self._messages.tool_form

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` works: there is a template in the file, or one was given at load."""
        return self._messages.has_template

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template, or the one given at load. Raises SettingError if there is none."""
        return self._messages.template

    def chat_tokens(self, messages: Messages, calling: Calling | None = None) -> list[int]:
        """``messages`` as the model reads them; control tokens count in the chat template, and are text in messages.

        ``calling``: the tools that the answer may call."""
        return self._messages.tokens(messages, calling)

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

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SettingError(
            "a loaded model cannot be pickled or copied; load it in the process that needs it (one file is mapped once "
            "for all), and use session() for a conversation of its own"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
