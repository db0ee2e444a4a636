"""Which of GGUF's named pre-tokenizers a tokenizer.json describes, read off its structure.

llama.cpp's converter compares hashes of a tokenised sample, which ties a name to a vocabulary. What the name stands
for is only how text is cut and whether whole words skip merging (``ignore_merges``), and tokenizer.json says both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimrt.errors import TokenizerError

__all__ = ["name_pre_tokenizer"]

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
# (splitting steps, ignore_merges) -> name. ByteLevel with use_regex splits by GPT-2's expression.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    # Vocabularies made from tiktoken ranks: merging never splits a word that is an entry, so both flags mean the same.
    ((_TEKKEN,), True): "tekken",
    ((_TEKKEN,), False): "tekken",
    (("gpt-2",), False): "gpt-2",
    (("single digits", "gpt-2"), False): "smollm",
}


def name_pre_tokenizer(tokenizer: dict[str, Any], path: Path) -> str:
    """The value of ``tokenizer.ggml.pre`` for a byte-level BPE tokenizer.json.

    Raises TokenizerError for rules that have no name there: text would be cut in the wrong places.
    """
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    name = _NAMES.get((steps, ignore_merges))
    if name is None:
        raise TokenizerError(
            f"{path}: the pre-tokenizer ({'; '.join(steps)[:160] or 'none'}; ignore_merges {ignore_merges}) has no "
            "name in GGUF that "
            f"slimrt knows; known are {', '.join(sorted(set(_NAMES.values())))}; choose a model with one of these"
        )
    return name


def _steps(definition: Any) -> list[str]:
    if not isinstance(definition, dict):
        return []
    kind = definition.get("type")
    if kind == "Sequence" and isinstance(definition.get("pretokenizers"), list):
        return [step for part in definition["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not definition.get("add_prefix_space", True):
        return ["gpt-2"] if definition.get("use_regex", True) else []
    if kind == "Digits" and definition.get("individual_digits"):
        return ["single digits"]
    if kind == "Split" and definition.get("behavior") == "Isolated" and not definition.get("invert"):
        pattern = definition.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        if expression == r"\p{N}":
            return ["single digits"]
        return [expression if isinstance(expression, str) else f"Split by {pattern}"]
    return [f"{kind} { ({key: value for key, value in definition.items() if key != 'type'}) }"]
