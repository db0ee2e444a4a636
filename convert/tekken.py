"""Mistral's tekken.json: byte-pair ranks with the pattern that cuts text (github.com/mistralai/mistral-common)."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from gguf import TokenType

from slimrt.convert.checkpoint import read_json
from slimrt.convert.pretokenizer import name_pre_tokenizer
from slimrt.convert.ranks import merges_of_ranks
from slimrt.convert.vocabulary import Vocabulary
from slimrt.errors import TokenizerError
from slimrt.text.bpe import BYTE_ALPHABET

__all__ = ["from_tekken"]

_ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


def from_tekken(path: Path) -> Vocabulary:
    """The vocabulary of a ``tekken.json``: its control tokens come first, then the ranks.

    Raises TokenizerError for numbers that contradict each other, and for a pattern without a name in GGUF.
    """
    data = read_json(path)
    config = data.get("config")
    config = config if isinstance(config, dict) else {}
    size, n_special = config.get("default_vocab_size"), config.get("default_num_special_tokens")
    entries = data.get("vocab")
    if not (
        type(size) is int
        and type(n_special) is int
        and isinstance(entries, list)
        and n_special >= 0
        and 256 <= size - n_special <= len(entries)
    ):
        raise TokenizerError(
            f"{path}: default_vocab_size less default_num_special_tokens must be 256 to the length of 'vocab'; the "
            "file is corrupt; fetch it again"
        )
    ranks: dict[bytes, int] = {}
    try:
        for rank, entry in enumerate(entries[: size - n_special]):
            if entry["rank"] != rank:
                raise ValueError(rank)
            ranks[base64.b64decode(entry["token_bytes"], validate=True)] = rank
    except (binascii.Error, ValueError, TypeError, KeyError):
        raise TokenizerError(
            f"{path}: entry {len(ranks)} of 'vocab' must have its place as 'rank' and base64 as 'token_bytes'; the "
            "file is corrupt; fetch it again"
        ) from None
    if len(ranks) < size - n_special or not all(bytes([byte]) in ranks for byte in range(256)):
        raise TokenizerError(
            f"{path}: tokens must be distinct and cover all single bytes; the file is corrupt; fetch it again"
        )
    pattern = {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": config.get("pattern")}}
    # Whole words are looked up first here, and in merging by rank that makes no difference.
    described = {"pre_tokenizer": pattern, "model": {"ignore_merges": True}}
    pre = name_pre_tokenizer(described, path, merges_whole=lambda: True)
    special = _special_texts(data.get("special_tokens"), n_special, path)
    vocabulary = Vocabulary(
        "gpt2",
        pre,
        special + ["".join(BYTE_ALPHABET[byte] for byte in token) for token in ranks],
        [TokenType.CONTROL] * n_special + [TokenType.NORMAL] * len(ranks),
        merges=merges_of_ranks(ranks),
        add={"bos": True, "eos": False},
    )
    vocabulary.special = {role: special.index(text) for role, text in _ROLES.items() if text in special}
    return vocabulary


def _special_texts(listed: Any, count: int, path: Path) -> list[str]:
    """The texts of the control tokens by id; those that the file does not name are numbered, as mistral-common does."""
    texts = [f"<SPECIAL_{number}>" for number in range(count)]
    if listed is None:  # files before version 7 leave them to the program
        listed = [{"rank": rank, "token_str": text} for rank, text in enumerate(_EARLY)]
    for entry in listed if isinstance(listed, list) else [None]:
        rank, text = (entry.get("rank"), entry.get("token_str")) if isinstance(entry, dict) else (None, None)
        if type(rank) is not int or not isinstance(text, str) or not rank >= 0:
            raise TokenizerError(
                f"{path}: 'special_tokens' must be a list of objects with rank and token_str; fetch the file again"
            )
        if rank < count:
            texts[rank] = text
    if len(set(texts)) < count:
        raise TokenizerError(f"{path}: two special tokens have the same text; the file is corrupt; fetch it again")
    return texts


# mistral_common/tokens/tokenizers/tekken.py, DEPRECATED_SPECIAL_TOKENS.
_EARLY = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
