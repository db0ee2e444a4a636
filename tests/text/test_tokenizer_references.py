"""Tokenizers against the libraries that the models' authors use, on random Unicode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from slimrt.text.pre import PRE_TOKENIZERS
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile
from tests.vocabularies import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIAL,
    metadata_of,
    sentencepiece_metadata,
    tiktoken_ranks,
    vocabulary_bytes,
    write_vocabulary,
)

# Assigned characters only: libraries are built with different Unicode versions. U+017F, the long s, is the one
# character that (?i:'s) takes for an s and llama.cpp does not.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\u017f")
# Runs of what pre-tokenizers treat alike, beside single characters from anywhere.
RUNS = st.builds(str.__mul__, st.sampled_from(" \n\t\r1aA'!中é\u0301\u3000🙂"), st.integers(1, 12))
WORDS = st.sampled_from(
    ["'s", "'LL", " the", "tion", "12345", "  \n ", "Привет", "日本語", "don't", "<|eot_id|>", "</s>"]
)
TEXTS = st.lists(st.one_of(CHARACTERS, RUNS, WORDS), max_size=30).map("".join)


@pytest.fixture(scope="module")
def llama3(llama3_file: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(llama3_file))


@pytest.fixture(scope="module")
def llama3_reference() -> tiktoken.Encoding:
    ranks = tiktoken_ranks("llama3")
    special = {text: len(ranks) + n for n, text in enumerate(LLAMA3_SPECIAL)}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@given(text=TEXTS)
def test_llama3_equals_tiktoken(llama3: Tokenizer, llama3_reference: tiktoken.Encoding, text: str) -> None:
    assert llama3.encode(text, add_bos=False) == llama3_reference.encode_ordinary(text)
    assert llama3.encode(text, add_bos=False, special=True) == llama3_reference.encode(text, allowed_special="all")
    assert llama3.decode(llama3.encode(text)) == text


@pytest.fixture(scope="module", params=["mistral-v1", "mistral-v3"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    path = tmp_path_factory.mktemp("mistral") / "mistral.gguf"
    tokenizer = Tokenizer.from_gguf(GGUFFile(write_vocabulary(path, sentencepiece_metadata(request.param))))
    return tokenizer, sentencepiece.SentencePieceProcessor(model_proto=vocabulary_bytes(request.param))


@given(text=TEXTS)
@example(text="  two  spaces  ")
@example(text="\0")
def test_mistral_equals_sentencepiece(pair: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], text: str) -> None:
    tokenizer, reference = pair
    ids = tokenizer.encode(text, add_bos=False)
    assert ids == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@pytest.fixture(scope="module")
def smollm2(default_model: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """The default model's tokenizer, and the same rebuilt with the library that trained it."""
    metadata = metadata_of(default_model)
    ids = {text: id for id, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return Tokenizer.from_gguf(GGUFFile(default_model)), reference


@given(text=TEXTS)
def test_smollm2_equals_tokenizers(smollm2: tuple[Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    tokenizer, reference = smollm2
    if tokenizer.decode(tokenizer.encode(text)) == text:  # else a byte has no token, and the library merges across it
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


QWEN2_PATTERN = (  # Qwen2's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_PATTERN = (  # Meta's llama_models/llama4/tokenizer.py
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("llama-bpe", LLAMA3_PATTERN), ("qwen2", QWEN2_PATTERN), ("llama4", O200K_PATTERN), ("tekken", None)],
)
def test_pieces_equal_those_of_the_models_own_pattern(name: str, pattern: str | None) -> None:
    pattern = pattern or json.loads(vocabulary_bytes("tekken"))["config"]["pattern"]
    reference = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")

    @given(text=TEXTS)
    def check(text: str) -> None:
        pieces = PRE_TOKENIZERS[name].split(text)
        assert "".join(pieces) == text
        assert pieces == [piece for piece, _ in reference.pre_tokenize_str(text)]

    check()
