"""The lower half of ``slimrt.Llama``: loading, tokens, and the running context that programs drive token by token."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from slimrt.errors import SettingError
from slimrt.hub import store
from slimrt.llama_cpp.embedding import check_pooling
from slimrt.llama_cpp.llama_grammar import grammar_of_llama
from slimrt.llama_cpp.llama_speculative import draft_of
from slimrt.llama_cpp.llama_tokenizer import LlamaTokens
from slimrt.llama_cpp.options import (
    RANDOM_SEED,
    Processors,
    StoppingCriteria,
    chat_template_of,
    check_refused,
    metadata_texts,
    penalty_processors,
    processor_tuple,
    rope_options,
    sampling_config,
)
from slimrt.llama_cpp.state import AllLogits
from slimrt.llm import LLM
from slimrt.load_options import LoadOptions
from slimrt.models import read_config
from slimrt.prune.plan import PrunePlan
from slimrt.sampler import Sampler, log_softmax
from slimrt.session import Session
from slimrt.structured import guide as guides
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile

__all__ = ["LlamaContext"]

_FEW = 48  # ids sent into a generator that passes of decode read sooner than one that unpacks every layer


class LlamaContext(LlamaTokens):
    """A model and one conversation."""

    def __init__(
        self,
        model_path: str | Path,
        *,
        n_gpu_layers: int = 0,
        split_mode: int = 1,
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: Mapping[str, Any] | None = None,
        seed: int = RANDOM_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        rope_scaling_type: int | None = -1,
        pooling_type: int = -1,
        attention_type: int = -1,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool = False,
        op_offload: bool | None = None,
        swa_full: bool | None = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: str | None = None,
        lora_scale: float = 1.0,
        lora_path: str | None = None,
        numa: bool | int = False,
        chat_format: str | None = None,
        chat_handler: Any = None,
        draft_model: Any = None,
        tokenizer: Any = None,
        type_k: int | None = None,
        type_v: int | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
        prune: PrunePlan | str | Path = "off",
        device: str | None = None,
        kv_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Load ``model_path``: a file, or "hf:owner/repo/file.gguf", or a name that ``slimrt pull`` knows.

        ``n_ctx`` 0 is the trained context. ``n_threads`` None uses all cores. ``seed`` -1 (or the default) draws again
        for each call. ``chat_format``: llama_cpp's name of a format, a Jinja template, or None for the file's.
        ``vocab_only`` loads the tokenizer alone. ``n_gpu_layers`` 0 computes on the CPU, any other number on a GPU
        where one works and the model fits. ``pooling_type``: what ``embed`` makes of a text's tokens: 0 (and -1) a
        vector for each, 1 their mean, 2 the first one's, 3 the last one's. ``draft_model``: LlamaPromptLookupDecoding,
        or None, where guesses are made if that costs nothing. ``lora_path``: a GGUF adapter, applied times
        ``lora_scale``. slimrt's own: ``prune`` ("auto", "fast", "off" or a
        plan), ``device`` ("cpu", "cuda", "auto" or "numpy", in the place of ``n_gpu_layers``), ``kv_budget`` (rows of
        each layer's keys and values that stay at hand).

        Raises SettingError (a ValueError) for a path that does not exist and for parameters that cannot be honoured,
        ModelFileError for an unusable file.
        """
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "kwargs")}
        check_refused(
            {
                "kv_overrides": kv_overrides or None, "lora_base": lora_base, "tokenizer": tokenizer,
                "chat_handler": chat_handler, "attention_type": attention_type,
                "yarn_ext_factor": yarn_ext_factor, "yarn_attn_factor": yarn_attn_factor,
                "yarn_beta_fast": yarn_beta_fast, "yarn_beta_slow": yarn_beta_slow, "yarn_orig_ctx": yarn_orig_ctx,
            },
            {
                "attention_type": -1, "yarn_ext_factor": -1.0, "yarn_attn_factor": 1.0,
                "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_orig_ctx": 0,
            },
        )  # fmt: skip
        if kwargs:  # llama_cpp takes them in silence, and programs carry parameters of its older versions
            warnings.warn(f"Llama: unknown parameters {', '.join(kwargs)} have no effect", RuntimeWarning, stacklevel=2)
        check_pooling(pooling_type)
        if logits_all and kv_budget is not None:
            raise SettingError("kv_budget with logits_all: only all rows give the logits of all tokens; leave one out")
        self._pooling = pooling_type
        file = GGUFFile(_path(model_path))
        template = chat_template_of(file, chat_format)
        self.model_path, self.verbose, self.draft_model = str(model_path), verbose, draft_model
        self.metadata = metadata_texts(file)
        self.n_batch, self.last_n_tokens_size = n_batch, last_n_tokens_size
        self.chat_format = chat_format
        if chat_format is None and "tokenizer.chat_template" in file.metadata:
            self.chat_format = "chat_template.default"
        self.set_seed(seed)
        self._config = read_config(file)
        self._ctx = n_ctx or self._config.ctx_train
        self._llm: LLM | None = None
        self._all_logits: AllLogits | None = None
        if vocab_only:
            self._tokenizer = Tokenizer.from_gguf(file)
            return
        options = LoadOptions(
            ctx=self._ctx,
            threads=n_threads,
            device=device or ("cpu" if n_gpu_layers == 0 else "auto"),
            kv_budget=kv_budget,
            prune="off" if logits_all else prune,
            chat_template=template,
            draft=draft_of(draft_model),
            lora=[] if lora_path is None else [(lora_path, lora_scale)],
            **rope_options(self._config.rope.scaling, rope_scaling_type, rope_freq_base, rope_freq_scale),
        )
        self._llm = LLM(file, options)
        self._tokenizer = self._llm.tokenizer
        self._session = self._llm.current
        if logits_all:
            self._all_logits = AllLogits(self._session.engine, self._ctx)
            self._all_logits.draft = self._session.engine.draft
            self._session = Session(self._all_logits, self._ctx, self._llm.asking)

    def n_ctx(self) -> int:
        return self._ctx

    def n_embd(self) -> int:
        return self._config.d_model

    # -- the running context -----------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """How many tokens the context holds; setting it forgets those behind."""
        return len(self._current.tokens)

    @n_tokens.setter
    def n_tokens(self, count: int) -> None:
        if not 0 <= count <= self.n_tokens:
            raise SettingError(f"n_tokens {count}: must lie in 0..{self.n_tokens}, the tokens that were read")
        self._current.truncate(count)

    @property
    def input_ids(self) -> np.ndarray:
        """The tokens of the context, then zeros: [n_ctx] int32. A copy."""
        ids = np.zeros(self._ctx, np.intc)
        ids[: self.n_tokens] = self._current.tokens
        return ids

    @property
    def _input_ids(self) -> np.ndarray:
        return np.array(self._current.tokens, np.intc)

    @property
    def eval_tokens(self) -> deque[int]:
        return deque(self._current.tokens, maxlen=self._ctx)

    @property
    def scores(self) -> np.ndarray:
        """Logits after every token: [n_ctx, V] float32. Raises SettingError unless loaded with ``logits_all=True``."""
        if self._all_logits is None:
            raise SettingError(
                "scores: only the logits after the last token are kept (eval_logits); load with logits_all=True"
            )
        return self._all_logits.scores

    @property
    def _scores(self) -> np.ndarray:
        return self.scores[: self.n_tokens]

    @property
    def eval_logits(self) -> deque[list[float]]:
        """The logits after every token with ``logits_all=True``, else after the last one."""
        if self._all_logits is not None:
            return deque(self._scores.tolist(), maxlen=self._ctx)
        logits = self._current.logits
        return deque([] if logits is None else [logits.tolist()], maxlen=1)

    def set_seed(self, seed: int) -> None:
        """Calls without a seed of their own draw theirs from this one; -1 makes them random."""
        self._seeds = None if seed in (-1, RANDOM_SEED) else random.Random(seed)

    def _seed(self, seed: int | None) -> int | None:
        if seed is None:
            return None if self._seeds is None else self._seeds.getrandbits(32)
        return None if seed in (-1, RANDOM_SEED) else seed

    def reset(self) -> None:
        """Forget the context."""
        self._current.reset()

    def eval(self, tokens: Sequence[int]) -> None:
        """Read further tokens. Raises ContextError (a ValueError) where they do not fit."""
        if len(tokens):
            self._current.extend([int(token) for token in tokens])

    def sample(
        self,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_eta: float = 0.1,
        mirostat_tau: float = 5.0,
        penalize_nl: bool = True,
        logits_processor: Processors = None,
        grammar: Any = None,
        idx: int | None = None,
    ) -> int:
        """Draw the token after the context (after token ``idx`` with ``logits_all``); penalties look at all of it."""
        check_refused({"grammar": grammar}, {})
        config = sampling_config(
            temp,
            top_k,
            top_p,
            min_p,
            typical_p,
            self._seed(None),
            (mirostat_mode, mirostat_tau, mirostat_eta),
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            penalty_last_n=max(0, self.last_n_tokens_size),
        )
        logits = self._current.logits if idx is None or idx == self.n_tokens - 1 else self._scores[idx]
        if logits is None:
            raise SettingError("nothing was read yet, or n_tokens was set back; call eval before sample")
        return Sampler(config, len(logits), processor_tuple(logits_processor))(logits, self._current.tokens)

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Processors = None,
        stopping_criteria: StoppingCriteria | None = None,
        grammar: Any = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Tokens after ``tokens``, without end: the caller stops. Ids that are sent in are read before the next one.

        ``reset`` False reads ``tokens`` after what the context holds. With a ``grammar`` they end with the answer.
        Raises ContextError when the context is full.
        """
        bound = grammar_of_llama(grammar)
        guide = None if bound is None else guides.start(bound, self._tokenizer, self._config.vocab_size)
        session = self._current
        with session.lock:
            self._read([int(token) for token in tokens], reset)
            revision = session.revision
        penalties = penalty_processors(
            repeat_penalty, frequency_penalty, presence_penalty, self.last_n_tokens_size, len(session.tokens)
        )
        sampler = Sampler(
            sampling_config(
                temp, top_k, top_p, min_p, typical_p, self._seed(None), (mirostat_mode, mirostat_tau, mirostat_eta)
            ),
            session.engine.config.vocab_size,
            (*processor_tuple(logits_processor), *penalties),
        )
        ids: list[int] = []
        while True:
            with session.lock:
                if session.revision != revision:
                    raise SettingError(
                        "the context read something else while these tokens were drawn; use a Llama for each"
                    )
                if 1 < len(ids) <= _FEW and session.engine.together > 1:
                    session.decode(ids)
                elif ids:
                    session.extend(ids)
                revision = session.revision
                assert session.logits is not None
                token = sampler(session.logits, session.tokens, guide)
                if stopping_criteria is not None and stopping_criteria(self._input_ids, session.logits):
                    return
            sent = yield token
            if guide is not None:
                for one in (token, *(sent or ())):
                    guide.take(one)
                if token in self._tokenizer.stop_ids:
                    return
            ids = [token, *(sent or ())]

    def _read(self, ids: list[int], reset: bool = True) -> None:
        if reset:
            self._current.prefill(ids, self._model.plan.plan)
        else:
            self._current.extend(ids)

    def close(self) -> None:
        """Free the model; only tokens and metadata are at hand afterwards."""
        if self._llm is not None:
            self._llm.close()
        self._llm = self._all_logits = None
        self.__dict__.pop("_session", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _model(self) -> LLM:
        if self._llm is None:
            raise SettingError(
                "the model's weights are not loaded (vocab_only=True, or closed); make a Llama without that"
            )
        return self._llm

    @property
    def _current(self) -> Session:
        assert self._model is not None
        return self._session

    @staticmethod
    def logits_to_logprobs(logits: np.ndarray | Sequence[Any], axis: int = -1) -> np.ndarray:
        """log-softmax along ``axis``, float32."""
        return np.apply_along_axis(log_softmax, axis, np.asarray(logits, np.float32))


def _path(model_path: str | Path) -> Path:
    name = str(model_path)
    if name not in store.CATALOG and not name.startswith("hf:") and not Path(name).exists():
        raise SettingError(
            f"model path {name!r} does not exist; name a .gguf file, hf:owner/repo/file.gguf or {store.DEFAULT_MODEL}"
        )
    return store.resolve(model_path)
