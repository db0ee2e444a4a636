"""Byte-level byte-pair encoding (GPT-2; Sennrich et al., arXiv 1508.07909) from a GGUF vocabulary and merges list."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable
from operator import add

import numpy as np
import tiktoken

from slimrt.errors import ModelFileError
from slimrt.text.merges import MergesList, rank_order
from slimrt.text.pre import PRE_TOKENIZERS, PreTokenizer
from slimrt.text.vocab import CONTROL, UNKNOWN, Vocabulary

__all__ = ["BYTE_ALPHABET", "ByteLevelBPE", "ListMerger", "parse_merges", "pre_tokenizer"]

_CACHE_PIECES = 1 << 17  # pieces of a few letters: some 20 MB
_NO_TOKEN = -1
_CACHE_LENGTH = 64  # characters; longer pieces seldom come back


def _byte_alphabet() -> str:
    """The character by which GPT-2's vocabulary writes each byte: printable Latin-1 as itself, the rest from U+0100."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return "".join(chr(0x100 + others.index(byte)) if byte in others else chr(byte) for byte in range(256))


BYTE_ALPHABET = _byte_alphabet()
_TO_ALPHABET = dict(enumerate(BYTE_ALPHABET))
_FROM_ALPHABET = {ord(char): byte for byte, char in enumerate(BYTE_ALPHABET)}


class ByteLevelBPE:
    """Text to ids and ids to bytes for ``tokenizer.ggml.model`` 'gpt2'.

    Text is cut by the pre-tokenizer that ``tokenizer.ggml.pre`` names, and pairs are merged within each piece: by
    tiktoken where its rank order is provably that of the merges list (see ``merges``), else by the list itself.

    Raises ModelFileError for an unknown pre-tokenizer or a merges list that does not fit the vocabulary.
    """

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        self._pre = pre_tokenizer(vocab)
        self._byte_ids = [vocab.ids.get(char, _NO_TOKEN) for char in BYTE_ALPHABET]
        merges = parse_merges(vocab, self._byte_ids)
        order = rank_order(merges, whole_pieces=self._pre.ignore_merges)
        self.rank_only = order is not None
        """Whether tiktoken does the merging."""
        self._merge: Callable[[str], list[int]]
        if order is None:
            merger, byte_ids = ListMerger(merges), self._byte_ids
            self._merge = lambda piece: merger.merge([byte_ids[byte] for byte in piece.encode()])
        else:
            self._merge = _RankMerger(self._byte_ids, order, vocab.tokens).merge
        self._cache: dict[str, list[int]] = {}

    @property
    def add_bos(self) -> bool:
        """Whether BOS is put in front where the metadata does not say."""
        return self._pre.add_bos

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, which holds no control tokens.

        Bytes for which the vocabulary has no token are left out, as in llama.cpp: SmolLM2's has none for six control
        characters and for the private planes above U+3FFFF.
        """
        ids: list[int] = []
        cached = self._cache.get
        for piece in self._pre.split(text):
            found = cached(piece)
            ids += self._encode_piece(piece) if found is None else found
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._whole(piece) or self._merge(piece)
        if _NO_TOKEN in ids:
            ids = [id for id in ids if id != _NO_TOKEN]
        if len(piece) <= _CACHE_LENGTH:
            if len(self._cache) >= _CACHE_PIECES:
                self._cache.clear()
            self._cache[piece] = ids
        return ids

    def _whole(self, piece: str) -> list[int] | None:
        if not self._pre.ignore_merges:
            return None
        id = self._vocab.ids.get(piece.encode().decode("latin-1").translate(_TO_ALPHABET))
        # Control tokens come from special=True alone, never from text that happens to spell one.
        return None if id is None or self._vocab.types[id] in (CONTROL, UNKNOWN) else [id]

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token ``id`` stands for."""
        text, plain = self._vocab.tokens[id], self._vocab.plain_bytes(id)
        if plain is not None:
            return plain
        try:
            return bytes(map(_FROM_ALPHABET.__getitem__, map(ord, text)))
        except KeyError:  # not written in the byte alphabet: the entry is plain text
            return text.encode()


def pre_tokenizer(vocab: Vocabulary) -> PreTokenizer:
    """The rule that ``vocab`` names, with a warning where it names none. Raises ModelFileError for an unknown one."""
    if vocab.pre is None:
        # What llama.cpp does, with a warning as loud: early files lack the key.
        warnings.warn(
            f"{vocab.path}: metadata key 'tokenizer.ggml.pre' is missing; the pre-tokenizer 'default' is used, "
            "which may split text unlike the model's own; convert the model again",
            stacklevel=2,
        )
        return PRE_TOKENIZERS["default"]
    rule = PRE_TOKENIZERS.get(vocab.pre)
    if rule is None:
        raise ModelFileError(
            f"{vocab.path}: tokenizer.ggml.pre is {vocab.pre[:80]!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}; "
            "use a model with one of these, or convert it with a converter that names one"
        )
    return rule


def parse_merges(vocab: Vocabulary, byte_ids: list[int]) -> MergesList:
    """The merges list of ``vocab`` as ids. Raises ModelFileError for an entry that the vocabulary does not have."""
    merges = vocab.text_list("tokenizer.ggml.merges")
    # An entry is cut at the first space after its first character, as in llama.cpp.
    cuts = [merge.find(" ", 1) for merge in merges]
    lefts = [merge[:cut] for merge, cut in zip(merges, cuts, strict=True)]
    rights = [merge[cut + 1 :] for merge, cut in zip(merges, cuts, strict=True)]
    id_of = vocab.ids.__getitem__
    try:
        if min(cuts, default=1) < 1:
            raise KeyError
        left, right, result = (
            np.fromiter(map(id_of, texts), np.int64, len(merges)) for texts in (lefts, rights, map(add, lefts, rights))
        )
    except KeyError:
        no = next(
            no
            for no, (left, right, cut) in enumerate(zip(lefts, rights, cuts, strict=True))
            if cut < 1 or not {left, right, left + right} <= vocab.ids.keys()
        )
        raise ModelFileError(
            f"{vocab.path}: tokenizer.ggml.merges entry {no} is {merges[no][:80]!r}; an entry is two vocabulary "
            "entries with a space between, and joined they are one too; the file is corrupt; convert the model again"
        ) from None
    return MergesList(left, right, result, vocab.tokens, np.array([id for id in byte_ids if id != _NO_TOKEN], np.int64))


class _RankMerger:
    """Merging by tiktoken; its ranks are the places of the reachable merges, mapped back to the model's ids."""

    def __init__(self, byte_ids: list[int], order: np.ndarray, tokens: list[str]) -> None:
        merged = order.tolist()
        self._ids = byte_ids + merged
        ranks = {bytes([byte]): byte for byte in range(256)}
        ranks.update(zip(_alphabet_bytes([tokens[id] for id in merged]), range(256, len(self._ids)), strict=True))
        # The pattern takes any text whole: pieces are cut before.
        self._encoding = tiktoken.Encoding("gguf", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={})

    def merge(self, piece: str) -> list[int]:
        ids = self._ids
        return [ids[rank] for rank in self._encoding.encode_ordinary(piece)]


def _alphabet_bytes(tokens: list[str]) -> list[bytes]:
    """The bytes of tokens written in the byte alphabet, all at once (128k tokens in 40 ms)."""
    table = np.zeros(0x200, np.uint8)
    table[list(_FROM_ALPHABET)] = list(_FROM_ALPHABET.values())
    joined = table[np.frombuffer("".join(tokens).encode("utf-32-le"), "<u4")].tobytes()
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    return [joined[end - len(token) : end] for token, end in zip(tokens, ends, strict=True)]


class ListMerger:
    """Merging by the list itself: lowest place first, leftmost first, with a heap, O(n log n) for any piece."""

    def __init__(self, merges: MergesList) -> None:
        self._made: dict[tuple[int, int], tuple[int, int]] = {}  # (left, right) -> (place, result)
        pairs = zip(merges.left.tolist(), merges.right.tolist(), strict=True)
        for place, (pair, made) in enumerate(zip(pairs, merges.result.tolist(), strict=True)):
            self._made.setdefault(pair, (place, made))

    def merge(self, ids: list[int]) -> list[int]:
        """``ids``, of the smallest parts of a piece, merged; they are changed in place."""
        made = self._made.get
        n = len(ids)
        before, after = list(range(-1, n - 1)), [*range(1, n), -1]
        heap = []
        for at in range(n - 1):
            found = made((ids[at], ids[at + 1]))
            if found:
                heap.append((found[0], at, ids[at], ids[at + 1], found[1]))
        heapq.heapify(heap)
        gone = -(1 << 31)  # below every id and every stand-in for one
        while heap:
            _, at, left, right, token = heapq.heappop(heap)
            other = after[at]
            if ids[at] != left or other < 0 or ids[other] != right:
                continue  # one of the two was merged meanwhile
            ids[at], ids[other] = token, gone
            follower = after[other]
            after[at] = follower
            if follower >= 0:
                before[follower] = at
                found = made((token, ids[follower]))
                if found:
                    heapq.heappush(heap, (found[0], at, token, ids[follower], found[1]))
            ahead = before[at]
            if ahead >= 0:
                found = made((ids[ahead], token))
                if found:
                    heapq.heappush(heap, (found[0], ahead, ids[ahead], token, found[1]))
        return [id for id in ids if id != gone]
