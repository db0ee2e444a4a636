"""A merges list is obeyed to the letter, whether tiktoken can be given ranks for it or not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slimrt.text.bpe import ByteLevelBPE
from slimrt.text.tokenizer import Tokenizer
from slimrt.text.vocab import Vocabulary
from slimrt.weights.gguf import GGUFFile
from tests.vocabularies import byte_alphabet, llama3_metadata, merges_of_ranks, write_vocabulary

Merges = list[tuple[str, str]]


def metadata(merges: Merges, others: tuple[str, ...] = (), pre: str = "gpt-2") -> dict[str, Any]:
    made = [head + tail for head, tail in merges]
    tokens = [*byte_alphabet(), *dict.fromkeys([*made, *others])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [f"{head} {tail}" for head, tail in merges],
    }


def coder(path: Path, entries: dict[str, Any]) -> ByteLevelBPE:
    return ByteLevelBPE(Vocabulary(GGUFFile(write_vocabulary(path, entries))))


def naive_ranks(entries: dict[str, Any]) -> tiktoken.Encoding:
    """What one would write at first: tiktoken with the vocabulary's ids as ranks."""
    byte = {char: value for value, char in enumerate(byte_alphabet())}
    ranks = {bytes(byte[char] for char in token): id for id, token in enumerate(entries["tokenizer.ggml.tokens"])}
    return tiktoken.Encoding("naive", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize(
    ("merges", "others", "text", "pieces", "rank_only"),
    [
        # The list has no pair (ab, c), although abc is a token.
        ([("a", "b"), ("b", "c"), ("a", "bc")], (), "abcx", ["ab", "c", "x"], True),
        # A vocabulary entry without any merge.
        ([("a", "b")], ("abc",), "abcx", ["ab", "c", "x"], True),
        # The piece as a whole is such an entry: without ignore_merges it is merged like any other.
        ([("a", "b")], ("abc",), "abc", ["ab", "c"], True),
        # Two merges make one token, and only the later one applies.
        ([("b", "c"), ("ab", "c"), ("c", "d"), ("a", "bc")], ("ab",), "abcdx", ["abc", "d", "x"], True),
        # Ids against the order of the list: the list counts.
        ([("b", "c"), ("a", "b")], (), "abcx", ["a", "bc", "x"], True),
        # A part is made after the pair that needs it.
        ([("a", "bc"), ("c", "d"), ("b", "c")], (), "abcdx", ["a", "b", "cd", "x"], False),
        ([("a", "bc"), ("b", "c"), ("c", "d")], (), "abcdx", ["abc", "d", "x"], False),
        # Leftmost first among equals.
        ([("a", "a"), ("aa", "a")], (), "aaaaax", ["aa", "aaa", "x"], True),
    ],
)
def test_cases_where_ranks_and_list_differ(
    tmp_path: Path, merges: Merges, others: tuple[str, ...], text: str, pieces: list[str], rank_only: bool
) -> None:
    bpe = coder(tmp_path / "v.gguf", metadata(merges, others))
    assert [bpe.token_bytes(id).decode() for id in bpe.encode(text)] == pieces
    assert bpe.rank_only is rank_only


def test_not_quite_all_splits(tmp_path: Path) -> None:
    """Several splits a token, as in LLaMA 3's list, but the one of abc that tiktoken would take is not listed."""
    merges = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "bc"), ("b", "cd"), ("bc", "d")]
    bpe = coder(tmp_path / "v.gguf", metadata(merges, pre="llama-bpe"))
    assert [bpe.token_bytes(id) for id in bpe.encode("abcx")] == [b"ab", b"c", b"x"]


def test_naive_ranks_would_be_wrong(tmp_path: Path) -> None:
    entries = metadata([("a", "b"), ("b", "c"), ("a", "bc")])
    assert naive_ranks(entries).encode_ordinary("abcx") != coder(tmp_path / "v.gguf", entries).encode("abcx")


def test_the_first_of_two_equal_merges_counts(tmp_path: Path) -> None:
    bpe = coder(tmp_path / "v.gguf", metadata([("b", "c"), ("a", "b"), ("b", "c")]))
    assert [bpe.token_bytes(id) for id in bpe.encode("abc")] == [b"a", b"bc"]


@st.composite
def merge_lists(draw: st.DrawFn) -> Merges:
    """Lists over two or three letters: trained, shuffled, thinned out, with several splits of one token."""
    letters = draw(st.sampled_from(["ab", "abc"]))
    tokens, merges = list(letters), []
    for _ in range(draw(st.integers(1, 14))):
        pair = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if pair not in merges and len("".join(pair)) <= 9:
            merges.append(pair)
            tokens = list(dict.fromkeys([*tokens, "".join(pair)]))
    kind = draw(st.sampled_from(["as made", "shuffled", "all splits", "thinned"]))
    if kind == "shuffled":
        merges = draw(st.permutations(merges))
    if kind == "all splits":
        ranks = {token.encode(): rank for rank, token in enumerate(tokens)}
        merges = [(head.decode(), tail.decode()) for head, tail in merges_of_ranks(ranks)]
    if kind == "thinned":
        kept = [merge for merge in merges if draw(st.booleans())]
        parts = {part for merge in kept for part in merge} - set(letters)
        merges = kept if parts <= {head + tail for head, tail in kept} else merges
    assume(merges)
    return list(merges)


@settings(max_examples=400)
@given(merges=merge_lists(), texts=st.lists(st.text("abc", max_size=24), min_size=4, max_size=4), whole=st.booleans())
def test_random_lists_equal_tokenizers(
    tmp_path_factory: pytest.TempPathFactory, merges: Merges, texts: list[str], whole: bool
) -> None:
    entries = metadata(merges, pre="llama-bpe" if whole else "gpt-2")
    ids = {token: id for id, token in enumerate(entries["tokenizer.ggml.tokens"])}
    reference = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges, ignore_merges=whole))
    bpe = coder(tmp_path_factory.getbasetemp() / "random.gguf", entries)
    for text in [*texts, *entries["tokenizer.ggml.tokens"][256:]]:
        assert bpe.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_tiktoken_serves_real_vocabularies(default_model: Path, tmp_path: Path) -> None:
    """The proof goes through for a trained list (SmolLM2's) and for one made from ranks (the first of LLaMA 3's)."""
    assert ByteLevelBPE(Vocabulary(GGUFFile(default_model))).rank_only
    assert coder(tmp_path / "small.gguf", llama3_metadata(20_000)).rank_only


def test_all_splits_without_whole_pieces(tmp_path: Path) -> None:
    """LLaMA 3's list under a rule that merges whole words too: their own bytes must lead to them."""
    entries = {**llama3_metadata(20_000), "tokenizer.ggml.pre": "smaug-bpe"}
    ids = {token: id for id, token in enumerate(entries["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in entries["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
    bpe = coder(tmp_path / "smaug.gguf", entries)
    words = random.Random(0).sample([token for token in ids if token.isascii() and token.isalpha()], 2000)
    for word in words:
        assert bpe.encode(word) == reference.encode(word, add_special_tokens=False).ids


def test_control_text_is_no_whole_piece(tmp_path: Path) -> None:
    entries = metadata([("a", "b")], others=("abab",), pre="llama-bpe")
    entries["tokenizer.ggml.token_type"] = [1] * 257 + [3]
    tokenizer = Tokenizer.from_gguf(GGUFFile(write_vocabulary(tmp_path / "v.gguf", entries)))
    assert tokenizer.encode("abab") == [256, 256]
    assert tokenizer.encode("abab", special=True) == [257]
