"""Vocabularies that are lists of ranks, as tiktoken reads them (LLaMA 3)."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path

from gguf import TokenType

from slimrt.convert.checkpoint import read_bounded
from slimrt.convert.vocabulary import MAX_MODEL_BYTES, Vocabulary
from slimrt.errors import ModelFileError, TokenizerError
from slimrt.text.bpe import BYTE_ALPHABET

__all__ = ["from_tiktoken", "is_tiktoken", "merges_of_ranks"]

# The control tokens of LLaMA 3, after the merged ones, as llama-models' tokenizer numbers them; the rest is reserved.
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)


def is_tiktoken(path: Path) -> bool:
    """Whether a ``tokenizer.model`` is a list of tiktoken ranks (text) rather than a SentencePiece model."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", read_bounded(path, MAX_MODEL_BYTES)[:1024]) is not None


def from_tiktoken(path: Path, size: int) -> Vocabulary:
    """LLaMA 3's ranks (base64 token, rank), ``size`` entries with its control tokens after the merged ones."""
    ranks: dict[bytes, int] = {}
    try:
        for line in read_bounded(path, MAX_MODEL_BYTES).splitlines():
            encoded, _, rank = line.partition(b" ")
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
    except ModelFileError:
        raise
    except (binascii.Error, ValueError):
        raise TokenizerError(
            f"{path}: line {len(ranks) + 1} is not a base64 token and a rank; fetch the file again"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise TokenizerError(
            f"{path}: ranks must be 0 to n-1 and cover all single bytes; the file is corrupt; fetch it again"
        )
    if len(ranks) > size:
        raise TokenizerError(
            f"{path}: {len(ranks)} tokens and an embedding of {size} rows; take the tokenizer of these weights"
        )

    n_special = size - len(ranks)
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(2, n_special))
    special = [*_LLAMA3_SPECIAL, *reserved][:n_special]
    vocabulary = Vocabulary(
        "gpt2",
        "llama-bpe",
        ["".join(BYTE_ALPHABET[byte] for byte in token) for token in sorted(ranks, key=ranks.__getitem__)] + special,
        [TokenType.NORMAL] * len(ranks) + [TokenType.CONTROL] * n_special,
        merges=merges_of_ranks(ranks),
        add={"bos": True, "eos": False},
    )
    for role, text in (("bos", "<|begin_of_text|>"), ("eos", "<|end_of_text|>"), ("pad", "<|finetune_right_pad_id|>")):
        if text in special:
            vocabulary.special[role] = len(ranks) + special.index(text)
    return vocabulary


def merges_of_ranks(ranks: Mapping[bytes, int]) -> list[str]:
    """The merges list that says what tiktoken's ranks say.

    tiktoken merges the adjacent pair whose concatenation has the lowest rank. The list holds every split of every token
    into two others, ordered by the token's rank.
    """
    text_of = {token: "".join(BYTE_ALPHABET[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        splits.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{text_of[left]} {text_of[right]}" for left, right in splits]
    return merges
