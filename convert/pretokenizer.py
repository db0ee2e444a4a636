"""Which of GGUF's named pre-tokenizers a tokenizer.json describes, read off its structure.

llama.cpp's converter compares hashes of a tokenised sample, which ties a name to a vocabulary. What the name stands
for is only how text is cut and whether whole words skip merging (``ignore_merges``), and tokenizer.json says both. The
rules are those of ``slimrt.text.pre``: what is recognised is what is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimrt.errors import TokenizerError
from slimrt.text.pre import CONTRACTION, GPT2, PRE_TOKENIZERS, thousands_by_boundary, thousands_marked

__all__ = ["name_normalizer", "name_pre_tokenizer"]

_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# Names that files in circulation carry, of the rules that have several.
_PREFERRED = (
    "llama-bpe",
    "dbrx",
    "smollm",
    "qwen2",
    "gpt-2",
    "gpt-4o",
    "deepseek-v3",
    "bloom",
    "bailingmoe",
    "tiny_aya",
)
# The same matches, written in other ways.
_SAME = (
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", "<contraction>"),
    (rf"(?:{CONTRACTION})", "<contraction>"),
    (CONTRACTION, "<contraction>"),
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"'(?i:[sdmt]|ll|ve|re)", r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"),
    (r"[^\r\n\p{L}\p{N}]?+", r"[^\r\n\p{L}\p{N}]?"),
    (r"[^\s\p{L}\p{N}]++", r"[^\s\p{L}\p{N}]+"),
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"(?<!\s)\s+$", r"\s+$"),
    (r"[\n]+", r"\n+"),
    (r"\"", '"'),
)
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
_FUNCTIONS = {thousands_by_boundary: r"\d{1,3}(?=(?:\d{3})*\b)", thousands_marked: r"(?=(\d{3})+(?!\d))"}
# Known to new readers only; where the flag makes no difference the older name with the other flag serves more of them.
_SELDOM_KNOWN = ("granite-embed-multi-97m",)
# DeepSeek's first tokenizers cut digits one by one; GGUF's rules leave runs, in which their vocabularies merge nothing.
_RUNS_OF_DIGITS = "deepseek-llm"

Steps = tuple[str, ...]


def _written(step: str | Callable[[str], list[str]]) -> str:
    if not isinstance(step, str):
        return _FUNCTIONS.get(step, "")
    for before, after in _SAME:
        step = step.replace(before, after)
    return _ESCAPE.sub(lambda match: chr(int(match[1] or match[2], 16)), step)


def _names() -> dict[tuple[Steps, bool], str]:
    """(steps, ignore_merges) -> name."""
    names: dict[tuple[Steps, bool], str] = {}
    for name in (*_PREFERRED, *PRE_TOKENIZERS):
        rule = PRE_TOKENIZERS[name]
        steps = tuple(map(_written, rule.patterns))
        if name != "default" and not rule.raw and "" not in steps:  # "default" is what files without a name get
            names.setdefault((steps, rule.ignore_merges), name)
    runs = PRE_TOKENIZERS[_RUNS_OF_DIGITS]
    steps = tuple(map(_written, runs.patterns))
    names[((*steps[:-1], r"\p{N}"), runs.ignore_merges)] = _RUNS_OF_DIGITS
    return names


_NAMES = _names()


def name_pre_tokenizer(tokenizer: dict[str, Any], path: Path, *, merges_whole: Callable[[], bool]) -> str:
    """The value of ``tokenizer.ggml.pre`` for a byte-level BPE tokenizer.json.

    ``merges_whole``: whether merging yields every entry of the vocabulary from its own text, so that ``ignore_merges``
    makes no difference; asked only where there is no name for the rule with that flag as it is.

    Raises TokenizerError for rules that have no name there: text would be cut in the wrong places.
    """
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    name, other = _NAMES.get((steps, ignore_merges)), _NAMES.get((steps, not ignore_merges))
    if (name is None or name in _SELDOM_KNOWN) and other is not None:
        if merges_whole():
            name = other
        elif name is None:
            raise TokenizerError(
                f"{path}: ignore_merges is {ignore_merges}, and GGUF has this pre-tokenizer as {other}, where it is "
                f"{not ignore_merges}; the vocabulary has entries for which that differs; choose another model"
            )
    if name is None:
        raise TokenizerError(
            f"{path}: the pre-tokenizer ({'; '.join(steps)[:160] or 'none'}; ignore_merges {ignore_merges}) has no "
            "name in GGUF that "
            f"slimrt knows; known are {', '.join(sorted(set(_NAMES.values())))}; choose a model with one of these"
        )
    return name


def name_normalizer(tokenizer: dict[str, Any], path: Path) -> str | None:
    """The Unicode normal form that a byte-level BPE tokenizer.json brings text to, None for none.

    Raises TokenizerError for other normalisers, which GGUF has no place for.
    """
    definition = tokenizer.get("normalizer")
    if isinstance(definition, dict) and definition.get("type") == "Sequence" and definition.get("normalizers") == []:
        definition = None
    kind = definition.get("type") if isinstance(definition, dict) else definition
    if kind is not None and kind not in _FORMS:
        raise TokenizerError(
            f"{path}: the normalizer is {str(kind)[:40]!r}; none or one of {', '.join(_FORMS)} can be converted; "
            "choose another model"
        )
    return kind


def _steps(definition: Any) -> list[str]:
    if not isinstance(definition, dict):
        return []
    kind = definition.get("type")
    if kind == "Sequence" and isinstance(definition.get("pretokenizers"), list):
        return [step for part in definition["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not definition.get("add_prefix_space", True):
        return [_written(GPT2)] if definition.get("use_regex", True) else []
    if kind == "Digits" and definition.get("individual_digits"):
        return [r"\p{N}"]
    if kind == "Split" and definition.get("behavior") == "Isolated" and not definition.get("invert"):
        pattern = definition.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        return [_written(expression) if isinstance(expression, str) else f"Split by {pattern}"]
    return [f"{kind} { ({key: value for key, value in definition.items() if key != 'type'}) }"]
