"""Vocabularies in the form that GGUF stores: from tokenizer.json, a SentencePiece model, or tiktoken ranks.

Keys and token types follow llama.cpp's convert_hf_to_gguf.py, so that every reader of its files reads these.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor

from slimrt.convert.checkpoint import read_bounded, read_json
from slimrt.convert.pretokenizer import name_pre_tokenizer
from slimrt.errors import ModelFileError, TokenizerError

__all__ = ["Vocabulary", "from_sentencepiece", "from_tiktoken", "from_tokenizer_json", "is_tiktoken"]

logger = logging.getLogger(__name__)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_MODEL_BYTES = 64 << 20  # of tokenizer.model; the largest known ones have 4 million
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0

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


@dataclass
class Vocabulary:
    """``tokens[id]`` with its type (and score, for SentencePiece), merges, the ids of special tokens by role.

    ``model`` is GGUF's name of the algorithm (``llama``: SentencePiece, ``gpt2``: byte-level BPE), ``pre`` of the
    pre-tokenizer. ``add`` says for ``bos``, ``eos`` whether they are put around a text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    add_space_prefix: bool | None = None
    chat_template: str | list[dict[str, str]] | None = None

    def resize(self, size: int, path: Path) -> None:
        """Pad to the rows of the embedding, or drop added tokens beyond them.

        Raises TokenizerError if tokens of the base vocabulary have no row.
        """
        base = (
            max((i for i, kind in enumerate(self.types) if kind in (TokenType.NORMAL, TokenType.BYTE)), default=-1) + 1
        )
        if base > size:
            raise TokenizerError(
                f"{path}: the vocabulary has {base} tokens and the embedding {size} rows; every token needs one; "
                "take the tokenizer that belongs to the weights"
            )
        if len(self.tokens) > size:
            logger.warning("%s: %d added tokens have no embedding row and are left out", path, len(self.tokens) - size)
        for i in range(len(self.tokens), size):
            self.tokens.append(f"[PAD{i}]")
            self.types.append(TokenType.UNUSED)
            if self.scores is not None:
                self.scores.append(_PADDING_SCORE)
        del self.tokens[size:], self.types[size:]
        if self.scores is not None:
            del self.scores[size:]
        self.special = {role: token for role, token in self.special.items() if token < size}

    def find_turn_ends(self) -> None:
        """Name the end-of-turn and end-of-message tokens by their texts, as llama.cpp does when it loads a file."""
        ids = {text: i for i, text in enumerate(self.tokens) if self.types[i] == TokenType.CONTROL}
        for role, texts in (
            ("eot", ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")),
            ("eom", ("<|eom_id|>",)),
        ):
            token = next((ids[text] for text in texts if text in ids), None)
            if token is not None:
                self.special.setdefault(role, token)

    def write(self, writer: GGUFWriter) -> None:
        """Add all ``tokenizer.*`` keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        for role, value in self.add.items():
            getattr(writer, f"add_add_{role}_token")(value)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def from_tokenizer_json(path: Path) -> Vocabulary:
    """Byte-level BPE, or the BPE with byte fallback that Transformers makes of a SentencePiece model.

    Raises TokenizerError for other algorithms and for pre-tokenizers without a name in GGUF.
    """
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else "missing"
        raise TokenizerError(
            f"{path}: the tokenizer model is {kind}; BPE can be converted; use a model of the LLaMA family"
        )
    merges = _read_merges(model.get("merges"), path)
    byte_fallback = bool(model.get("byte_fallback"))
    pre = "default" if byte_fallback else name_pre_tokenizer(data, path)

    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token for token in added
    ):
        raise TokenizerError(
            f"{path}: 'added_tokens' must be a list of objects with id and content; fetch the file anew"
        )
    ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
    numbers_valid = all(type(number) is int and number >= 0 for number in ids.values())
    by_id = {number: text for text, number in ids.items()} if numbers_valid else {}
    if not ids or len(by_id) != len(ids):
        raise TokenizerError(
            f"{path}: token ids must be distinct whole numbers from 0; the file is corrupt; fetch it anew"
        )
    size = max(by_id, default=-1) + 1
    if size > 2 * len(by_id) + 65536:
        raise TokenizerError(
            f"{path}: {len(by_id)} tokens and ids up to {size - 1}; ids must be dense; the file is corrupt"
        )

    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [TokenType.NORMAL if i in by_id else TokenType.UNUSED for i in range(size)]
    if byte_fallback:
        types = [
            TokenType.BYTE if _BYTE_TOKEN.fullmatch(token) else kind for token, kind in zip(tokens, types, strict=True)
        ]
        if isinstance(unknown := model.get("unk_token"), str) and unknown in ids:
            types[ids[unknown]] = TokenType.UNKNOWN
    for token in added:
        if types[token["id"]] != TokenType.UNKNOWN:
            _mark_added(token["id"], token["content"], bool(token.get("special")), tokens, types)

    vocabulary = Vocabulary("llama" if byte_fallback else "gpt2", pre, tokens, types)
    if byte_fallback:
        vocabulary.scores = _scores_from_merges(tokens, merges)
        vocabulary.add_space_prefix = _has_space_prefix(data, path)
        if isinstance(unknown, str) and unknown in ids:
            vocabulary.special["unk"] = ids[unknown]
    else:
        vocabulary.merges = [f"{left} {right}" for left, right in merges]
    return vocabulary


def _read_merges(merges: Any, path: Path) -> list[tuple[str, str]]:
    """Pairs, from either of the two forms: "left right" or ["left", "right"]."""
    pairs = []
    for merge in merges if isinstance(merges, list) else [None]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) and part and " " not in part for part in pair)
        ):
            raise TokenizerError(
                f"{path}: merge {str(merge)[:60]!r} is not a pair of tokens; the file is corrupt; fetch it anew"
            )
        pairs.append((pair[0], pair[1]))
    return pairs


def _scores_from_merges(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    # SentencePiece merges the pair whose result has the best score; the merges list is in that order of results.
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    return [float(-rank[token]) if token in rank else -1.0 * len(rank) - 1.0 for token in tokens]


def _has_space_prefix(data: dict[str, Any], path: Path) -> bool:
    """Whether a space goes in front of a text: the normalizer's Prepend, or Metaspace's prepend scheme."""

    def flatten(part: Any, inner: str) -> list[dict[str, Any]]:
        if not isinstance(part, dict):
            return []
        return (
            [leaf for child in part[inner] for leaf in flatten(child, inner)]
            if isinstance(part.get(inner), list)
            else [part]
        )

    steps = flatten(data.get("normalizer"), "normalizers") + flatten(data.get("pre_tokenizer"), "pretokenizers")
    for step in steps:
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    if not any(step.get("type") == "Replace" and step.get("content") == "▁" for step in steps):
        raise TokenizerError(
            f"{path}: neither Metaspace nor Replace turns spaces into ▁; SentencePiece vocabularies need it; fetch "
            "the file anew"
        )
    return any(step.get("type") == "Prepend" for step in steps)


def _mark_added(token: int, text: str, special: bool, tokens: list[str], types: list[TokenType]) -> None:
    looks_special = text.startswith("<|") and text.endswith("|>")
    if special or looks_special or text == "<pad>":
        tokens[token], types[token] = text, TokenType.CONTROL
    else:
        # llama.cpp matches these in the raw text, so they are stored with plain spaces.
        tokens[token], types[token] = text.replace("▁", " "), TokenType.USER_DEFINED


def from_sentencepiece(path: Path, added: Mapping[int, tuple[str, bool]] | None = None) -> Vocabulary:
    """A SentencePiece BPE model, with ``added`` tokens (id -> text, whether it is a control token) on top."""
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(read_bounded(path, _MAX_MODEL_BYTES))
    except RuntimeError as error:
        raise TokenizerError(f"{path}: not a SentencePiece model ({str(error)[:80]}); fetch the file anew") from None
    count = processor.vocab_size()
    size = max([count, *(number + 1 for number in added or () if number < count + 65536)])
    tokens = [processor.IdToPiece(i) if i < count else f"[PAD{i}]" for i in range(size)]
    scores = [processor.GetScore(i) if i < count else _PADDING_SCORE for i in range(size)]
    types = [_piece_type(processor, i) if i < count else TokenType.UNUSED for i in range(size)]
    for number, (text, special) in (added or {}).items():
        if 0 <= number < size and types[number] != TokenType.UNKNOWN:
            _mark_added(number, text, special, tokens, types)
            scores[number] = _ADDED_SCORE
    roles = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id(), "pad": processor.pad_id()}
    return Vocabulary(
        "llama",
        "default",
        tokens,
        types,
        scores,
        special={role: token for role, token in roles.items() if token >= 0},
        add={"bos": True, "eos": False},
        add_space_prefix=processor.Normalize("a").startswith("▁"),
    )


def _piece_type(processor: SentencePieceProcessor, token: int) -> TokenType:
    if processor.IsUnknown(token):
        return TokenType.UNKNOWN
    if processor.IsControl(token):
        return TokenType.CONTROL
    if processor.IsUnused(token):
        return TokenType.UNUSED
    if processor.IsByte(token):
        return TokenType.BYTE
    return TokenType.NORMAL


def is_tiktoken(path: Path) -> bool:
    """Whether a ``tokenizer.model`` is a list of tiktoken ranks (text) rather than a SentencePiece model."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", read_bounded(path, _MAX_MODEL_BYTES)[:1024]) is not None


def from_tiktoken(path: Path, size: int) -> Vocabulary:
    """LLaMA 3's ranks (base64 token, rank), ``size`` entries with its control tokens after the merged ones.

    tiktoken merges the adjacent pair whose concatenation has the lowest rank. The merges list that says the same
    holds every split of every token into two others, ordered by the token's rank.
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in read_bounded(path, _MAX_MODEL_BYTES).splitlines():
            encoded, _, rank = line.partition(b" ")
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
    except ModelFileError:
        raise
    except (binascii.Error, ValueError):
        raise TokenizerError(
            f"{path}: line {len(ranks) + 1} is not a base64 token and a rank; fetch the file anew"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise TokenizerError(
            f"{path}: ranks must be 0 to n-1 and cover all single bytes; the file is corrupt; fetch it anew"
        )
    if len(ranks) > size:
        raise TokenizerError(
            f"{path}: {len(ranks)} tokens and an embedding of {size} rows; take the tokenizer of these weights"
        )

    letters = _byte_letters()
    text_of = {token: "".join(letters[byte] for byte in token) for token in ranks}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = []
    for token in by_rank:
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        splits.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{text_of[left]} {text_of[right]}" for left, right in splits]

    n_special = size - len(ranks)
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(2, n_special))
    special = [*_LLAMA3_SPECIAL, *reserved][:n_special]
    vocabulary = Vocabulary(
        "gpt2",
        "llama-bpe",
        [text_of[token] for token in by_rank] + special,
        [TokenType.NORMAL] * len(ranks) + [TokenType.CONTROL] * n_special,
        merges=merges,
        add={"bos": True, "eos": False},
    )
    for role, text in (("bos", "<|begin_of_text|>"), ("eos", "<|end_of_text|>"), ("pad", "<|finetune_right_pad_id|>")):
        if text in special:
            vocabulary.special[role] = len(ranks) + special.index(text)
    return vocabulary


def _byte_letters() -> list[str]:
    """GPT-2's visible letter for every byte: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]
