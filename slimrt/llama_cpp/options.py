"""What llama_cpp.Llama's parameters mean here: translated, accepted without effect, or refused.

Accepted without effect, since they only say how llama.cpp computes: ``n_gpu_layers split_mode main_gpu tensor_split
use_mmap use_mlock n_batch n_ubatch n_threads_batch offload_kqv flash_attn op_offload swa_full no_perf numa
type_k type_v spm_infill verbose`` at load (keys and values are kept in the type that the backend computes with, float16
or float32), ``tfs_z penalize_nl`` at generation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slimrt.config import SamplingConfig
from slimrt.errors import SettingError
from slimrt.sampler import LogitsProcessor, apply_penalties
from slimrt.text.chat_template import BUILTIN_TEMPLATES
from slimrt.weights.gguf import GGUFFile

__all__ = [
    "RANDOM_SEED",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "Processors",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "chat_template_of",
    "check_numbers",
    "check_refused",
    "metadata_texts",
    "penalty_processors",
    "processor_tuple",
    "rope_options",
    "sampling_config",
    "token_biases",
]

StoppingCriteria = Callable[[np.ndarray, np.ndarray], bool]
"""(ids so far [N], logits [V]) -> whether the text ends here."""

Processors = LogitsProcessor | Sequence[LogitsProcessor] | None

RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: a fresh one; -1 means the same

_REFUSED = {
    "kv_overrides": "metadata is used as it stands in the file; change the file",
    "lora_base": "adapters are applied to the model as it is; leave it out",
    "tokenizer": "tokens come from the model file; leave it out",
    "chat_handler": "chats go through Jinja templates; give chat_format",
    "attention_type": "attention is causal; leave it out",
    "yarn_ext_factor": "YaRN's constants are the paper's; leave it out",
    "yarn_attn_factor": "YaRN's constants are the paper's; leave it out",
    "yarn_beta_fast": "YaRN's constants are the paper's; leave it out",
    "yarn_beta_slow": "YaRN's constants are the paper's; leave it out",
    "yarn_orig_ctx": "the trained context is the file's; leave it out",
    "grammar": "one token tells nothing of a whole answer; give it to generate or create_completion",
    "suffix": "filling in the middle is not offered; leave it out",
}
_CHAT_FORMATS = {
    "chatml-function-calling": "chatml",
    "llama-2": "llama2",
    "llama-3": "llama3",
    "mistral-instruct": "mistral",
}
_ROPE_SCALINGS = {-1: None, 0: "none", 1: "linear", 2: "yarn"}


class LogitsProcessorList(list[LogitsProcessor]):
    """Processors run one after the other."""

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class MinTokensLogitsProcessor:
    """Keeps the text from ending before it has ``min_tokens`` tokens; one for each text."""

    def __init__(self, min_tokens: int, token_eos: int) -> None:
        self.min_tokens, self.token_eos = min_tokens, token_eos
        self.prompt_tokens: int | None = None

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        if self.prompt_tokens is None:
            self.prompt_tokens = len(input_ids)
        if len(input_ids) - self.prompt_tokens < self.min_tokens:
            scores[self.token_eos] = -np.inf
        return scores


class StoppingCriteriaList(list[StoppingCriteria]):
    """Ends the text as soon as one of them says so."""

    def __call__(self, input_ids: np.ndarray, logits: np.ndarray) -> bool:
        answers = [criterion(input_ids, logits) for criterion in self]  # all are asked: some count the calls
        return any(answers)


def check_refused(given: Mapping[str, Any], harmless: Mapping[str, Any]) -> None:
    """Raises SettingError for the first of ``given`` whose value is neither None nor the one in ``harmless``."""
    for name, value in given.items():
        if value is not None and value != harmless.get(name):
            raise SettingError(f"{name}={_short(value)}: {_REFUSED[name]}")


def check_numbers(**values: Any) -> None:
    """Raises SettingError for the first value that is not a number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise SettingError(f"{name} {_short(value)}: must be a number")


def rope_options(file_scaling: str, scaling_type: int | None, base: float, scale: float) -> dict[str, Any]:
    """llama.cpp's RoPE parameters as ``LLM``'s; a model without scaling of its own is not stretched unless asked to."""
    if scaling_type is None:
        scaling_type = -1
    if scaling_type not in _ROPE_SCALINGS:
        raise SettingError(f"rope_scaling_type {scaling_type}: must be -1 (the model's), 0 none, 1 linear or 2 YaRN")
    if base < 0 or scale < 0:
        raise SettingError(f"rope_freq_base {base}, rope_freq_scale {scale}: must be above 0, or 0 for the model's own")
    scaling, factor = _ROPE_SCALINGS[scaling_type], 1 / scale if scale else None
    if scaling is None and file_scaling == "none":
        scaling = "linear" if factor else "none"
    if scaling in ("linear", "yarn"):
        factor = factor or 1.0
    return {"rope_base": base or None, "rope_scaling": scaling, "rope_factor": factor}


def chat_template_of(file: GGUFFile, chat_format: str | None) -> str | None:
    """The template that ``chat_format`` names: a built-in (llama_cpp's name or slimrt's), one of the file, or Jinja."""
    if chat_format is None or chat_format == "chat_template.default":
        return None
    if chat_format.startswith("chat_template."):
        return file.get(f"tokenizer.{chat_format}", str)
    name = _CHAT_FORMATS.get(chat_format, chat_format)
    if name not in BUILTIN_TEMPLATES and "{" not in name:
        known = ", ".join(sorted({*BUILTIN_TEMPLATES, *_CHAT_FORMATS}))
        raise SettingError(
            f"chat_format {chat_format!r}: must be one of {known}, or a Jinja template; None is the model's"
        )
    return name


def sampling_config(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float,
    seed: int | None,
    mirostat: tuple[int, float, float] = (0, 5.0, 0.1),
    **more: Any,
) -> SamplingConfig:
    """llama_cpp's sampling parameters: values beyond a filter's end switch it off; below 0 temperature, all filters.

    ``mirostat``: mode, tau and eta. With a mode of 1 or 2 no temperature applies, as in llama_cpp, but 0 is greedy.
    """
    check_numbers(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    mode, tau, eta = mirostat
    if mode not in (0, 1, 2):
        raise SettingError(f"mirostat_mode={_short(mode)}: must be 1 or 2, the version, or 0 for none")
    if temperature < 0:
        return SamplingConfig(temperature=1.0, seed=seed, **more)
    if mode and temperature > 0:
        return SamplingConfig(temperature=1.0, mirostat=mode, mirostat_tau=tau, mirostat_eta=eta, seed=seed, **more)
    return SamplingConfig(
        temperature=temperature,
        top_k=max(0, top_k),
        top_p=min(1.0, top_p),
        min_p=max(0.0, min_p),
        typical_p=min(1.0, typical_p),
        seed=seed,
        **more,
    )


def penalty_processors(
    repeat: float, frequency: float, presence: float, last_n: int, start: int
) -> tuple[LogitsProcessor, ...]:
    """llama_cpp's penalties: they look at the last ``last_n`` generated tokens, those from index ``start`` on."""
    if (repeat, frequency, presence) == (1.0, 0.0, 0.0):
        return ()
    config = SamplingConfig(
        repeat_penalty=repeat, frequency_penalty=frequency, presence_penalty=presence, penalty_last_n=max(0, last_n)
    )

    def penalise(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return apply_penalties(scores, ids[start:].tolist(), config)

    return (penalise,)


def processor_tuple(processors: LogitsProcessor | Sequence[LogitsProcessor] | None) -> tuple[LogitsProcessor, ...]:
    """A list of processors (also a ``LogitsProcessorList``, of either library), a single one, or None."""
    if processors is None:
        return ()
    return tuple(processors) if isinstance(processors, Sequence) else (processors,)


def token_biases(logit_bias: Mapping[Any, Any] | None) -> dict[int, float]:
    """OpenAI's ``logit_bias``, whose keys are often texts."""
    try:
        return {int(token): float(bias) for token, bias in (logit_bias or {}).items()}
    except (TypeError, ValueError, AttributeError):
        raise SettingError(f"logit_bias {_short(logit_bias)}: must be a dict of token id -> number") from None


def metadata_texts(file: GGUFFile) -> dict[str, str]:
    """The file's metadata as llama.cpp spells it: text for everything, arrays left out."""
    return {
        key: _spell(value) for key, value in file.metadata.items() if not isinstance(value, (list, tuple, np.ndarray))
    }


def _spell(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    return f"{value:f}" if isinstance(value, (float, np.floating)) else str(value)


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:80] + "..."
