"""Vocabularies in the form that GGUF stores: from tokenizer.json or a SentencePiece model; ``ranks`` has a third way.

Keys and token types follow llama.cpp's convert_hf_to_gguf.py, so that every reader of its files reads these.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor

from slimrt.convert.checkpoint import read_bounded, read_json
from slimrt.convert.pretokenizer import name_normalizer, name_pre_tokenizer
from slimrt.convert.sentencepiece_proto import read_model
from slimrt.errors import TokenizerError
from slimrt.text.bpe import BYTE_ALPHABET, ListMerger
from slimrt.text.merges import MergesList, rank_order
from slimrt.text.tokenizer import NORMALIZER_KEY, PREFIX_KEY, STRIP_KEYS, STRIP_STATED_KEY

__all__ = [
    "MAX_MODEL_BYTES",
    "Vocabulary",
    "from_sentencepiece",
    "from_tokenizer_json",
    "space_prefix",
    "stripping",
]

logger = logging.getLogger(__name__)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
MAX_MODEL_BYTES = 64 << 20  # of tokenizer.model; the largest known ones have 4 million
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0


@dataclass
class Vocabulary:
    """``tokens[id]`` with its type (and score, for SentencePiece), merges, the ids of special tokens by role.

    ``model`` is GGUF's name of the algorithm (``llama``: SentencePiece, ``gpt2``: byte-level BPE), ``pre`` of the
    pre-tokenizer. ``add`` says for ``bos``, ``eos`` whether they are put around a text. ``normalizer``: the Unicode
    normal form that text gets. ``space_prefix``: see ``slimrt.text.tokenizer``. ``strip``: ids of tokens before
    (``left``) or behind which blanks are dropped.
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
    space_prefix: str | None = None
    remove_extra_spaces: bool = False
    normalizer: str | None = None
    strip: dict[str, list[int]] = field(default_factory=dict)
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
        self.strip = {side: [token for token in ids if token < size] for side, ids in self.strip.items()}

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
        if self.add_space_prefix and self.space_prefix is not None:
            writer.add_string(PREFIX_KEY, self.space_prefix)
        if self.remove_extra_spaces:
            writer.add_remove_extra_whitespaces(True)
        if self.normalizer is not None:
            writer.add_string(NORMALIZER_KEY, self.normalizer)
        if self.scores is not None:  # Phi-3's kind, of which readers of files from elsewhere must guess
            writer.add_bool(STRIP_STATED_KEY, True)
        for side, ids in self.strip.items():
            if ids:
                writer.add_array(STRIP_KEYS[side], ids)
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
    for part in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(part):
            raise TokenizerError(
                f"{path}: {part} is {str(model[part])[:20]!r}; GGUF has no place for one; choose another model"
            )
    byte_fallback = bool(model.get("byte_fallback"))
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token for token in added
    ):
        raise TokenizerError(
            f"{path}: 'added_tokens' must be a list of objects with id and content; fetch the file again"
        )
    ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
    numbers_valid = all(type(number) is int and number >= 0 for number in ids.values())
    by_id = {number: text for text, number in ids.items()} if numbers_valid else {}
    if not ids or len(by_id) != len(ids):
        raise TokenizerError(
            f"{path}: token ids must be distinct whole numbers from 0; the file is corrupt; fetch it again"
        )
    size = max(by_id, default=-1) + 1
    if size > 2 * len(by_id) + 65536:
        raise TokenizerError(
            f"{path}: {len(by_id)} tokens and ids up to {size - 1}; ids must be dense; the file is corrupt"
        )

    known = model["vocab"].keys()
    for left, right in merges:
        if not {left, right, left + right} <= known:
            raise TokenizerError(
                f"{path}: merge {f'{left} {right}'[:60]!r} is of tokens that the vocabulary lacks; the file is "
                "corrupt; fetch it again"
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

    def merges_whole() -> bool:
        apart = {token["content"] for token in added}  # found in text before merging
        entries = {text: id for text, id in model["vocab"].items() if text not in apart}
        return _merges_whole(entries, merges, tokens)

    pre = "default" if byte_fallback else name_pre_tokenizer(data, path, merges_whole=merges_whole)
    vocabulary = Vocabulary("llama" if byte_fallback else "gpt2", pre, tokens, types)
    vocabulary.strip = stripping(added)
    if byte_fallback:
        vocabulary.scores = _scores_from_merges(tokens, merges)
        vocabulary.add_space_prefix, vocabulary.space_prefix = space_prefix(data, path)
        if isinstance(unknown, str) and unknown in ids:
            vocabulary.special["unk"] = ids[unknown]
    else:
        vocabulary.merges = [f"{left} {right}" for left, right in merges]
        vocabulary.normalizer = name_normalizer(data, path)
    return vocabulary


def stripping(added: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """For ``Vocabulary.strip``: the ids of ``added`` tokens beside which blanks are dropped."""
    return {side: [token["id"] for token in added if token.get(f"{side[0]}strip") is True] for side in STRIP_KEYS}


def _merges_whole(ids: Mapping[str, int], merges: list[tuple[str, str]], tokens: list[str]) -> bool:
    """Whether merging yields every entry from its own text."""
    bytes_ = [ids[letter] for letter in BYTE_ALPHABET if letter in ids]
    place = {text: id for id, text in enumerate(tokens)}
    left, right, result = (
        np.fromiter((place[text] for text in texts), np.int64, len(merges))
        for texts in ((a for a, _ in merges), (b for _, b in merges), (a + b for a, b in merges))
    )
    listed = MergesList(left, right, result, tokens, np.array(bytes_, np.int64))
    order = rank_order(listed, whole_pieces=False)
    if order is not None:
        return set(ids.values()) <= {*bytes_, *order.tolist()}
    merger = ListMerger(listed)
    return all(
        set(text) <= ids.keys() and merger.merge([ids[char] for char in text]) == [id]
        for text, id in ids.items()
        if len(text) > 1
    )


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
                f"{path}: merge {str(merge)[:60]!r} is not a pair of tokens; the file is corrupt; fetch it again"
            )
        pairs.append((pair[0], pair[1]))
    return pairs


def _scores_from_merges(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    # SentencePiece merges the pair whose result has the best score; the merges list is in that order of results.
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    return [float(-rank[token]) if token in rank else -1.0 * len(rank) - 1.0 for token in tokens]


def space_prefix(data: dict[str, Any], path: Path) -> tuple[bool, str | None]:
    """Whether a space goes in front of a text (the normalizer's Prepend, or Metaspace's scheme), and by which rule."""

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
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            if step.get("replacement", "▁") != "▁" or scheme not in ("always", "first", "never"):
                raise TokenizerError(
                    f"{path}: Metaspace with {str(step.get('replacement'))[:20]!r} and the scheme "
                    f"{str(scheme)[:20]!r}; a low line (always, first or never) is known; fetch the file again"
                )
            return scheme != "never", f"metaspace {scheme}"
    if not any(step.get("type") == "Replace" and step.get("content") == "▁" for step in steps):
        raise TokenizerError(
            f"{path}: neither Metaspace nor Replace turns spaces into ▁; SentencePiece vocabularies need it; fetch "
            "the file again"
        )
    return any(step.get("type") == "Prepend" for step in steps), None


def _mark_added(token: int, text: str, special: bool, tokens: list[str], types: list[TokenType]) -> None:
    looks_special = text.startswith("<|") and text.endswith("|>")
    if special or looks_special or text == "<pad>":
        tokens[token], types[token] = text, TokenType.CONTROL
    else:
        # llama.cpp matches these in the raw text, so they are stored with plain spaces.
        tokens[token], types[token] = text.replace("▁", " "), TokenType.USER_DEFINED


def from_sentencepiece(path: Path, added: Mapping[int, tuple[str, bool]] | None = None) -> Vocabulary:
    """A SentencePiece BPE model, with ``added`` tokens (id -> text, whether it is a control token) on top.

    Raises TokenizerError for another type of model, and for one that normalises more than spaces.
    """
    processor = SentencePieceProcessor()
    raw = read_bounded(path, MAX_MODEL_BYTES)
    try:
        processor.LoadFromSerializedProto(raw)
    except RuntimeError as error:
        raise TokenizerError(f"{path}: not a SentencePiece model ({str(error)[:80]}); fetch the file again") from None
    model = read_model(raw, path)
    count = processor.vocab_size()
    size = max([count, *(number + 1 for number in added or () if number < count + 65536)])
    tokens = [processor.IdToPiece(i) if i < count else f"[PAD{i}]" for i in range(size)]
    scores = [processor.GetScore(i) if i < count else _PADDING_SCORE for i in range(size)]
    types = [_piece_type(processor, i) if i < count else TokenType.UNUSED for i in range(size)]
    for number in model.user_defined:
        tokens[number], types[number] = tokens[number].replace("▁", " "), TokenType.USER_DEFINED
    for number, text in enumerate(tokens):
        if text.startswith("[UNUSED"):  # InternLM2's reserve
            types[number] = TokenType.UNUSED
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
        add_space_prefix=model.add_space_prefix,
        remove_extra_spaces=model.remove_extra_spaces,
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
