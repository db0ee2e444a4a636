"""``slimrt.Llama``: programs written for ``llama_cpp.Llama`` (llama-cpp-python 0.3) run on slimrt.

Method names, parameters, defaults and results are that class's. What differs on purpose: parameters that would change
the answer and have no counterpart are refused (``options.py`` lists them, and those accepted without effect);
``logprobs`` needs no ``logits_all``; with ``echo``, log-probabilities stand beside their own tokens; nothing is
printed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from slimrt.errors import ContextError, SettingError
from slimrt.generation import Step, generate_tokens
from slimrt.llama_cpp.embedding import embedded, embedding_response
from slimrt.llama_cpp.llama_grammar import grammar_of_llama
from slimrt.llama_cpp.llama_tokenizer import LlamaTokenizer
from slimrt.llama_cpp.missing import METHODS
from slimrt.llama_cpp.openai_format import CompletionFormat, LogprobFormat, chat_chunks, chat_completion
from slimrt.llama_cpp.options import (
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    Processors,
    StoppingCriteria,
    StoppingCriteriaList,
    check_numbers,
    check_refused,
    penalty_processors,
    processor_tuple,
    sampling_config,
    token_biases,
)
from slimrt.llama_cpp.pretrained import fetched, matching_file
from slimrt.llama_cpp.state import LlamaState
from slimrt.llama_cpp.states import LlamaStates
from slimrt.request import GenerationRequest
from slimrt.results import FinishReason, TokenLogprob
from slimrt.sampler import top_logprobs
from slimrt.structured import guide as guides
from slimrt.structured.grammar import response_grammar
from slimrt.tools.calling import Calling
from slimrt.tools.openai_form import tools_and_choice

__all__ = [
    "Llama",
    "LlamaState",
    "LlamaTokenizer",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "StoppingCriteriaList",
]

Messages = Sequence[Mapping[str, Any]]


class Llama(LlamaStates):
    """A model and one conversation, with the interface of ``llama_cpp.Llama``."""

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str,
        additional_files: Sequence[str] | None = None,
        local_dir: str | Path | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load ``filename`` (a name or a pattern that one file matches) of a Hugging Face repository.

        The other parts of a model in several files come along without being named; ``additional_files`` are fetched
        beside it. ``local_dir``: a folder for the files themselves; ``cache_dir``: in the place of huggingface_hub's
        cache. Raises FetchError where a file cannot be had.
        """
        file = matching_file(repo_id, filename)
        others = [matching_file(repo_id, other) for other in additional_files or ()]
        if local_dir is None and cache_dir is None and not others:
            return cls(f"hf:{repo_id}/{file}", **kwargs)
        return cls(fetched(repo_id, file, others, local_dir, cache_dir), **kwargs)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            reason = METHODS.get(name)
            if reason is not None:
                raise AttributeError(f"Llama.{name}: {reason}")
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    # -- completion --------------------------------------------------------------------------------------------------

    def create_completion(
        self,
        prompt: str | Sequence[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = (),
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: StoppingCriteria | None = None,
        logits_processor: Processors = None,
        grammar: Any = None,
        logit_bias: Mapping[Any, float] | None = None,
    ) -> Any:
        """Continue ``prompt``: OpenAI's text completion as a dictionary, or with ``stream`` an iterator of chunks.

        ``max_tokens`` None or below 1: up to the end of the context. Penalties look at the generated tokens.
        ``grammar``: a LlamaGrammar; an answer that ``max_tokens`` cuts has finish_reason "length".
        Raises ContextError (a ValueError) if the prompt leaves no room in the context.
        """
        check_refused({"suffix": suffix or None}, {})
        bound = grammar_of_llama(grammar)
        if bound is not None:  # refused before the prompt is read
            guides.start(bound, self._tokenizer, self._config.vocab_size)
        if max_tokens is not None:
            check_numbers(max_tokens=max_tokens)
        ids = self._prompt_ids(prompt)
        room = self._ctx - len(ids)
        if room < 1:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, the context window is {self._ctx} and must hold the answer too; "
                "shorten the prompt, or load with a larger n_ctx"
            )
        penalties = penalty_processors(
            repeat_penalty, frequency_penalty, presence_penalty, self.last_n_tokens_size, len(ids)
        )
        config = sampling_config(
            temperature, top_k, top_p, min_p, typical_p, self._seed(seed),
            (mirostat_mode, mirostat_tau, mirostat_eta), logit_bias=token_biases(logit_bias),
        )  # fmt: skip
        request = GenerationRequest(
            max_tokens=room if max_tokens is None or max_tokens < 1 else min(max_tokens, room),
            sampling=config,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            processors=(*processor_tuple(logits_processor), *penalties),
            logprobs=logprobs,
            grammar=bound,
            one_by_one=stopping_criteria is not None,
            shown=grammar.shown if isinstance(grammar, Calling) else frozenset(),
        )
        if echo and logprobs is not None and self._all_logits is None:
            raise SettingError("echo with logprobs needs the logits of the prompt; load with logits_all=True")
        run = _Run(self, prompt, ids, request, stopping_criteria, CompletionFormat(model or self.model_path))
        return run.chunks() if stream else run.whole(echo)

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: Messages,
        functions: Any = None,
        function_call: Any = None,
        tools: Any = None,
        tool_choice: Any = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Processors = None,
        grammar: Any = None,
        logit_bias: Mapping[Any, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> Any:
        """Answer ``messages``: OpenAI's chat completion as a dictionary, or with ``stream`` an iterator of chunks.

        ``response_format``: {"type": "json_object"}, with a "schema" beside it if one is wanted, or OpenAI's
        {"type": "json_schema", ...}; it goes before ``grammar``.

        Control tokens that are spelt in a message are text, where llama_cpp lets them count.

        ``tools``, ``tool_choice`` (and the older ``functions``, ``function_call``): as at OpenAI, through the model's
        own template and form of calls; the arguments of a call fit its schema.

        Raises SettingError for malformed messages and for a model without a chat template.
        """
        tools, tool_choice, older = tools_and_choice(tools, tool_choice, functions, function_call)
        calling = self._model.calling(tools, tool_choice, False if older else None)
        bound = response_grammar(response_format) or grammar
        if calling is not None:
            calling = calling.or_valid_by(grammar_of_llama(bound))
        answer = self.create_completion(
            self._model.chat_tokens(messages, calling),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            logprobs=(top_logprobs or 0) if logprobs else None,
            stop=stop,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            repeat_penalty=repeat_penalty,
            top_k=top_k,
            stream=stream,
            seed=seed,
            mirostat_mode=mirostat_mode,
            mirostat_tau=mirostat_tau,
            mirostat_eta=mirostat_eta,
            model=model,
            logits_processor=logits_processor,
            grammar=calling or bound,
            logit_bias=logit_bias,
        )
        return chat_chunks(answer, calling, older=older) if stream else chat_completion(answer, calling, older=older)

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """As ``create_chat_completion``, in the openai package's classes: a ChatCompletion, or with ``stream`` an
        iterator of ChatCompletionChunk. Raises ImportError where that package is missing."""
        try:
            from openai.types.chat import ChatCompletion, ChatCompletionChunk
        except ImportError as error:
            raise ImportError("create_chat_completion_openai_v1 needs a package: pip install openai") from error
        answer = self.create_chat_completion(*args, **kwargs)
        if kwargs.get("stream", False):
            return (ChatCompletionChunk(**chunk) for chunk in answer)
        return ChatCompletion(**answer)

    # -- embeddings ----------------------------------------------------------------------------------------------------

    def pooling_type(self) -> int:
        """What ``embed`` makes of a text's tokens; a decoder's own way is none (0)."""
        return max(0, self._pooling)

    def embed(
        self, input: str | list[str], normalize: bool = False, truncate: bool = True, return_count: bool = False
    ) -> Any:
        """A text's vector, or a list of them: lists of numbers, without pooling one for each of its tokens.

        ``truncate``: texts are cut at ``n_batch`` tokens, as in llama_cpp; else longer ones are refused. With
        ``return_count`` a pair: that, and how many tokens were read. The running context is forgotten.
        """
        ids = [self.tokenize(text.encode()) for text in ([input] if isinstance(input, str) else input)]
        if truncate:
            ids = [one[: self.n_batch] for one in ids]
        long = next((len(one) for one in ids if len(one) > self.n_batch), None)
        if long is not None:
            raise SettingError(f"a text has {long} tokens, n_batch is {self.n_batch}; load with a larger one")
        self.reset()
        vectors = embedded(self._model, ids, self.pooling_type(), normalize)
        found = vectors[0] if isinstance(input, str) else vectors
        return (found, sum(map(len, ids))) if return_count else found

    def create_embedding(self, input: str | list[str], model: str | None = None) -> dict[str, Any]:
        """OpenAI's list of embeddings as a dictionary."""
        texts = [input] if isinstance(input, str) else input
        vectors, tokens = self.embed(texts, return_count=True)
        return embedding_response(vectors, model or self.model_path, tokens)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            if not isinstance(prompt, (Sequence, np.ndarray)):
                raise SettingError(f"prompt of type {type(prompt).__name__}: must be text or a list of token ids")
            return self._model.token_ids(prompt)
        ids = self._tokenizer.encode(prompt, special=True)
        bos = self._tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos]:
            warnings.warn(
                "the prompt begins with BOS and the model adds one; leave it out", RuntimeWarning, stacklevel=3
            )
        # As in llama_cpp, an empty prompt starts from BOS.
        return ids or ([] if bos is None else [bos])


class _Run:
    """One completion: the prompt, how to go on from it, and the shape of the answer."""

    def __init__(
        self,
        llama: Llama,
        prompt: str | Sequence[int],
        ids: list[int],
        request: GenerationRequest,
        criteria: StoppingCriteria | None,
        format: CompletionFormat,
    ) -> None:
        self._llama, self._tokenizer = llama, llama._tokenizer
        self._prompt, self._ids, self._request, self._criteria = prompt, ids, request, criteria
        self._format = format

    def _steps(self) -> Iterator[Step]:
        llama, shown = self._llama, 0
        tokens: list[int] = []
        session = llama._current
        with session.lock:
            llama._recall(self._ids)
            llama._read(self._ids)
            revision = session.revision
        for step in generate_tokens(session, self._tokenizer, self._request, revision=revision):
            if step.token is not None and self._criteria is not None and session.logits is not None:
                # As in llama_cpp: asked before the drawn token counts, which is dropped if the answer is yes.
                if self._criteria(llama._input_ids, session.logits):
                    llama._remember()
                    yield Step(None, self._tokenizer.decode(tokens)[shown:], None, "stop")
                    return
                tokens.append(step.token)
            shown += len(step.text)
            if step.finish_reason is not None:
                llama._remember()
            yield step

    def chunks(self) -> Iterator[dict[str, Any]]:
        logprobs = LogprobFormat(self._tokenizer, len(self._prompt))
        reason: FinishReason = "length"
        for step in self._steps():
            entry = None
            if step.token is not None and step.logprob is not None:
                entry = logprobs([(step.token, step.logprob)])
            if step.text or entry is not None:
                yield self._format.chunk(step.text, entry, None)
            reason = step.finish_reason or reason
        yield self._format.chunk("", None, reason)

    def whole(self, echo: bool) -> dict[str, Any]:
        with self._llama._current.lock:  # nobody moves the context on meanwhile
            steps = list(self._steps())
        written = [(step.token, step.logprob) for step in steps if step.token is not None]
        text = "".join(step.text for step in steps)
        if echo:
            text = (self._prompt if isinstance(self._prompt, str) else self._tokenizer.decode(self._ids)) + text
        logprobs = None
        if self._request.logprobs is not None:
            entries = [*self._prompt_logprobs(self._request.logprobs), *written] if echo else written
            logprobs = LogprobFormat(self._tokenizer, 0 if echo else len(self._prompt))(entries)
        reason = steps[-1].finish_reason
        assert reason is not None
        return self._format.whole(text, logprobs, reason, len(self._ids), len(written))

    def _prompt_logprobs(self, top: int) -> list[tuple[int, TokenLogprob | None]]:
        """The prompt's tokens with their log-probabilities; a leading BOS is left out, the first token has none."""
        scores, ids = self._llama.scores, self._ids
        first = 1 if ids[0] == self._tokenizer.bos_id and len(ids) > 1 else 0
        rest = [(ids[at], top_logprobs(scores[at - 1], ids[at], top)) for at in range(first + 1, len(ids))]
        return [(ids[first], None), *rest]
