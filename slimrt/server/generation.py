"""From the fields of a request to a prompt and how it is answered; shared by the interfaces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from slimrt.errors import SettingError, SlimrtError
from slimrt.llm import LLM
from slimrt.request import GenerateOptions, GenerationRequest
from slimrt.server.errors import ApiError
from slimrt.server.fields import Field
from slimrt.structured import guide as guides
from slimrt.structured.grammar import Grammar, grammar_of, response_grammar
from slimrt.tools.calling import Calling

__all__ = [
    "IGNORED",
    "SAMPLING",
    "TEXTS",
    "bound_grammar",
    "chat_ids",
    "generation_request",
    "messages_schema",
    "text_of",
]

NUMBER, INTEGER, STRING, BOOLEAN, OBJECT, ARRAY, ANY = (
    (kind,) for kind in ("number", "integer", "string", "boolean", "object", "array", "any")
)
_MOST = 1 << 31
_TOKEN = {"type": "integer", "minimum": 0}
# One text, its ids, or a list of either.
TEXTS = {
    "minLength": 1, "minItems": 1,
    "items": {"anyOf": [{"type": "string", "minLength": 1}, _TOKEN, {"type": "array", "minItems": 1, "items": _TOKEN}]},
}  # fmt: skip


def messages_schema(*roles: str) -> dict[str, Any]:
    """What JSON schema says of a list of messages by these roles."""
    part = {
        "type": "object", "required": ["type", "text"],
        "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": {"type": "string"}},
    }  # fmt: skip
    content = {"type": ["string", "array", "null"], "items": part}
    message = {
        "type": "object", "required": ["role"], "properties": {"role": {"enum": list(roles)}, "content": content},
    }  # fmt: skip
    return {"minItems": 1, "items": message}


# What draws the next token: OpenAI's fields, and llama.cpp's names for what OpenAI lacks.
SAMPLING: dict[str, Field] = {
    "temperature": Field(NUMBER, "0: the likeliest token", 1.0, 0, 100),
    "top_p": Field(NUMBER, "draw from the likeliest tokens with this probability in sum", 1.0, 0, 1),
    "top_k": Field(INTEGER, "draw from so many of the likeliest tokens; 0: all", 0, 0, _MOST),
    "min_p": Field(NUMBER, "least share of the top probability", 0.0, 0, 1),
    "typical_p": Field(NUMBER, "locally typical sampling; 1: off", 1.0, 0, 1),
    "top_n_sigma": Field(NUMBER, "logits within so many standard deviations of the largest; 0: off", 0.0, 0, 1000),
    "xtc_probability": Field(NUMBER, "how often the likeliest tokens are left out", 0.0, 0, 1),
    "xtc_threshold": Field(NUMBER, "which these are: all but the last of at least this probability", 0.1, 0, 1),
    "dynatemp_range": Field(NUMBER, "how far the temperature moves with the candidates' entropy; 0: off", 0.0, 0, 100),
    "dynatemp_exponent": Field(NUMBER, "power of the entropy's share", 1.0, 0, 100),
    "mirostat": Field(INTEGER, "1 or 2: mirostat of this version in place of the filters; 0: off", 0, 0, 2),
    "mirostat_tau": Field(NUMBER, "the surprise that mirostat aims at, in bits", 5.0, 0, 100),
    "mirostat_eta": Field(NUMBER, "how fast mirostat corrects", 0.1, 0, 1),
    "dry_multiplier": Field(NUMBER, "penalty of a token that makes a repetition longer; 0: off", 0.0, 0, 1000),
    "dry_base": Field(NUMBER, "by which the penalty grows with each token repeated", 1.75, 1, 1000),
    "dry_allowed_length": Field(INTEGER, "repetitions up to this many tokens cost nothing more", 2, 0, _MOST),
    "dry_penalty_last_n": Field(INTEGER, "tokens that are looked at; 0: none, -1: all", 64, -1, _MOST),
    "dry_sequence_breakers": Field(
        ARRAY,
        "texts that no repetition goes across",
        ("\n", ":", '"', "*"),
        inside={"maxItems": 64, "items": {"type": "string", "minLength": 1}},
    ),
    "repeat_penalty": Field(NUMBER, "weakens tokens that were there recently; 1: off", 1.0, 0.01, 100),
    "presence_penalty": Field(NUMBER, "subtracted once from tokens that were there", 0.0, -2, 2),
    "frequency_penalty": Field(NUMBER, "subtracted for each time that a token was there", 0.0, -2, 2),
    "logit_bias": Field(OBJECT, "token id -> what is added to its logit, -100 to 100"),
    "seed": Field(
        INTEGER,
        "the same seed gives the same text, of several answers each a text of its own",
        None,
        -(1 << 63),
        (1 << 63) - 1,
    ),
    "ignore_eos": Field(BOOLEAN, "go on behind the end token", False),
}
# Taken, and without effect here: they change accounting, routing and storage at a provider, not the text.
IGNORED: dict[str, Field] = {
    name: Field(ANY, "accepted, without effect")
    for name in (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options",
        "parallel_tool_calls", "cache_prompt", "verbosity",
    )
}  # fmt: skip


def generation_request(llm: LLM, values: Mapping[str, Any], **more: Any) -> GenerationRequest:
    """The sampling fields of a request, checked, and ``more`` options. Raises ApiError."""
    options: dict[str, Any] = {
        **{name: values[name] for name in SAMPLING if name in values and name not in ("logit_bias", "seed")},
        "logit_bias": _biases(values.get("logit_bias"), llm.config.vocab_size),
        "seed": None if values.get("seed") is None else int(values["seed"]) % (1 << 63),
        **more,
    }
    try:
        return llm.request(cast(GenerateOptions, options))
    except SettingError as error:
        raise ApiError(400, str(error), code="invalid_value") from None


def _biases(given: Mapping[str, Any] | None, vocab: int) -> dict[int, float]:
    biases = {}
    for token, bias in (given or {}).items():
        whole = token.isascii() and token.isdecimal() and int(token) < vocab
        real = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        if not whole or not real:
            raise ApiError(
                400,
                f"'logit_bias' has {token[:40]!r}: {str(bias)[:40]}; ids are 0 to {vocab - 1}, biases -100 to 100",
                param="logit_bias",
            )
        biases[int(token)] = -math.inf if bias == -100 else float(bias)  # -100: never, as OpenAI promises
    return biases


def bound_grammar(llm: LLM, response_format: Any, grammar: str | None = None) -> Grammar | None:
    """What the answer must match, compiled: a request that cannot be met is refused at once. Raises ApiError."""
    param = "response_format" if response_format else "grammar"
    try:
        found = response_grammar(response_format or None)
        if grammar and found is not None:
            raise SettingError("an answer can be bound to one of response_format and grammar; leave the other out")
        found = grammar_of(None, grammar or None) or found
        if found is not None:
            guides.start(found, llm.tokenizer, llm.config.vocab_size)
    except SettingError as error:
        raise ApiError(400, f"'{param}': {error}", param=param) from None
    return found


def text_of(content: Any, where: str) -> str:
    """The text of a message's content: a string, or parts of type text. Raises ApiError for other parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: content must be a text or a list of parts", param="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise ApiError(
                400, f"{where}: content of type {str(kind)[:40]!r}; this model reads text only", param="messages"
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise ApiError(400, f"{where}: a part of type {kind!r} without its text", param="messages")
        texts.append(text)
    return "".join(texts)


def chat_ids(llm: LLM, messages: Sequence[Mapping[str, Any]], calling: Calling | None = None) -> list[int]:
    """Messages as the model's chat template has them, with the tools that may be called. Raises ApiError."""
    if not llm.has_chat_template:
        raise ApiError(400, f"{llm.config.name} has no chat template; use /v1/completions")
    try:
        return llm.chat_tokens(messages, calling)
    except SlimrtError as error:  # the template refuses, such as two user messages in a row
        raise ApiError(400, str(error), param="messages") from None
