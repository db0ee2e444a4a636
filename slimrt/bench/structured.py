"""What a schema costs: compiling it, finding the tokens that may come next, and how many need not be drawn."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from slimrt.llm import LLM
from slimrt.structured.grammar import Grammar
from slimrt.structured.guide import forget, start
from slimrt.text.tokenizer import Tokenizer
from slimrt.tools.formats import GENERIC
from slimrt.tools.grammar import answer_grammar
from slimrt.tools.tool import tools_of

__all__ = ["GRAMMARS", "GuideCost", "decode_ms", "measure"]

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"enum": ["author", "editor", "reader"]}, "maxItems": 3},
    },
    "required": ["name", "age", "born", "tags"],
    "additionalProperties": False,
}
GRAMMARS = {
    "JSON object": Grammar.json_object(),
    "record": Grammar.json_schema(_PERSON),
    "100 records": Grammar.json_schema({"type": "array", "items": _PERSON, "minItems": 1, "maxItems": 100}),
    "1000 names": Grammar.json_schema({"enum": [f"name number {n * 7919 % 10007}" for n in range(1000)]}),
    "regex": Grammar.regex(r"[A-Z][a-z]+( [A-Z][a-z]+){1,3}, \d{4}-\d\d-\d\d"),
    "GBNF": Grammar.gbnf('root ::= item ("\\n" item){0,20}\nitem ::= "- " [a-zA-Z ,]{1,80}'),
}


@dataclass(frozen=True)
class GuideCost:
    """``compile_s``; microseconds to check one token, to find all that may come next, and the slowest of these;
    ``forced``: the share of tokens that the grammar alone decides."""

    name: str
    compile_s: float
    check_us: float
    mask_us: float
    mask_max_us: float
    forced: float
    tokens: int


def measure(tokenizer: Tokenizer, tokens: int = 400, seed: int = 0) -> list[GuideCost]:
    """Walk through every grammar of ``GRAMMARS`` for about ``tokens`` tokens, drawn evenly from those allowed."""
    start(Grammar.regex("."), tokenizer)  # the vocabulary is read once for all
    tools = tools_of([{"name": f"tool_{number}", "parameters": _PERSON} for number in range(8)])
    called = {
        f"8 tools, {name}": answer_grammar(GENERIC, tools, tokenizer, required=required)
        for name, required in (("text", False), ("calls", True))
    }
    forget(tokenizer)  # so that compiling counts
    return [_walk(name, grammar, tokenizer, tokens, seed) for name, grammar in {**GRAMMARS, **called}.items()]


def decode_ms(llm: LLM, tokens: int = 24) -> float:
    """Milliseconds that the model takes for a token, without a grammar; of a session of its own."""
    with llm.session() as session:
        done = llm.generate("The", max_tokens=tokens, ignore_eos=True, session=session)
    return 1000 / done.timings.decode_tok_s


def _walk(name: str, grammar: Grammar, tokenizer: Tokenizer, tokens: int, seed: int) -> GuideCost:
    rng = np.random.default_rng(seed)
    begun = time.perf_counter()
    guide = start(grammar, tokenizer)
    compile_s = time.perf_counter() - begun
    checks: list[float] = []
    masks: list[float] = []
    forced = 0
    while len(masks) + forced < tokens:
        begun = time.perf_counter()
        mask = guide.allowed()
        masks.append(time.perf_counter() - begun)
        ids = np.flatnonzero(mask)
        token = int(rng.choice(ids))
        begun = time.perf_counter()
        assert guide.allows(token)
        if token not in tokenizer.stop_ids:
            guide.take(token)
        checks.append(time.perf_counter() - begun)
        forced += len(guide.forced(tokens))
        if guide.done or token in tokenizer.stop_ids:
            guide = start(grammar, tokenizer)
    micro = 1e6
    return GuideCost(
        name,
        compile_s,
        float(np.median(checks)) * micro,
        float(np.median(masks)) * micro,
        max(masks) * micro,
        forced / (len(masks) + forced),
        len(masks) + forced,
    )
