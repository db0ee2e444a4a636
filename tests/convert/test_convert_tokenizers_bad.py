"""Tokenizer files that cannot be converted, and metadata that the tokenizer does not take: one clear line each."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from slimrt.convert.pretokenizer import name_pre_tokenizer
from slimrt.convert.tekken import from_tekken
from slimrt.convert.vocabulary import from_sentencepiece, from_tokenizer_json
from slimrt.errors import ModelFileError, TokenizerError
from slimrt.text.tokenizer import NORMALIZER_KEY, PREFIX_KEY, STRIP_KEYS, Tokenizer
from slimrt.weights.gguf import GGUFFile
from tests.text.test_tokenizer_families import TEKKEN_PATTERN, split
from tests.text.test_tokenizer_references import QWEN2_PATTERN
from tests.vocabularies import LLAMA3_PATTERN, byte_alphabet, write_vocabulary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "normalization_rule_name": "identity"}, "of the unigram type; the byte-pair type"),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, "normalised by 'nmt_nfkc' before it is cut"),
        (
            {"model_type": "bpe", "normalization_rule_name": "identity", "treat_whitespace_as_suffix": True},
            "spaces stay as they are, or stand behind words",
        ),
    ],
)
def test_sentencepiece_models_that_gguf_has_no_place_for(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the other one went there and back again"] * 9), model_writer=model, vocab_size=40,
        minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(TokenizerError, match=message) as caught:
        from_sentencepiece(path)
    assert "\n" not in str(caught.value)


def described(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of single bytes and one merge, changed."""
    model = {"type": "BPE", "vocab": {text: id for id, text in enumerate([*byte_alphabet(), "ab"])}, "merges": ["a b"]}
    return {"pre_tokenizer": split(LLAMA3_PATTERN), "model": model | changes.pop("model", {}), **changes}


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (described(model={"merges": ["a b", "ab zz"]}), "merge 'ab zz' is of tokens that the vocabulary lacks"),
        (described(model={"merges": ["a c"]}), "merge 'a c' is of tokens that the vocabulary lacks"),
        (described(model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix is '</w>'; GGUF has no place for one"),
        (described(normalizer={"type": "Lowercase"}), "the normalizer is 'Lowercase'; none or one of NFC"),
        (described(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 2}), "normalizer is 'Sequence'"),
        (described(normalizer=7), "the normalizer is '7'"),
        (
            described(model={"byte_fallback": True}, pre_tokenizer={"type": "Metaspace", "prepend_scheme": "last"}),
            "the scheme 'last'; a low line .always, first or never. is known",
        ),
    ],
)
def test_bad_tokenizer_json_is_one_clear_line(definition: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    with pytest.raises(TokenizerError, match=message) as caught:
        from_tokenizer_json(path)
    assert "\n" not in str(caught.value)


def test_a_flag_without_a_name_needs_a_vocabulary_for_which_it_makes_no_difference() -> None:
    definition = {"pre_tokenizer": split(QWEN2_PATTERN), "model": {"ignore_merges": True}}
    assert name_pre_tokenizer(definition, Path("t"), merges_whole=lambda: True) == "qwen2"
    with pytest.raises(TokenizerError, match="GGUF has this pre-tokenizer as qwen2, where it is False"):
        name_pre_tokenizer(definition, Path("t"), merges_whole=lambda: False)


def test_entries_that_merging_never_makes_are_found(tmp_path: Path) -> None:
    definition = described(model={"ignore_merges": True}) | {"pre_tokenizer": split(QWEN2_PATTERN)}
    definition["model"]["vocab"] |= {"xyz": 257}  # no merge leads to it
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    with pytest.raises(TokenizerError, match="entries for which that differs"):
        from_tokenizer_json(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"default_vocab_size": 10**9}, "must be 256 to the length of 'vocab'"),
        ({"default_num_special_tokens": -1}, "must be 256 to the length of 'vocab'"),
        ({"pattern": "x+"}, "has no name in GGUF"),
        ({"vocab": {3: {"rank": 3, "token_bytes": "!"}}}, "entry 3 of 'vocab' must have its place"),
        ({"vocab": {3: {"rank": 4, "token_bytes": "Aw=="}}}, "entry 3 of 'vocab' must have its place"),
        ({"vocab": {256: {"rank": 256, "token_bytes": "AA=="}}}, "tokens must be distinct and cover"),
        ({"special_tokens": [{"rank": "0"}]}, "'special_tokens' must be a list of objects"),
        ({"special_tokens": [{"rank": n, "token_str": "x"} for n in (0, 1)]}, "two special tokens have the same text"),
    ],
)
def test_bad_tekken_is_one_clear_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    texts = [bytes([byte]) for byte in range(256)] + [b"ab"]
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(text).decode()} for rank, text in enumerate(texts)]
    for place, entry in changes.pop("vocab", {}).items():
        vocab[place] = entry
    data: dict[str, Any] = {"vocab": vocab}
    if "special_tokens" in changes:
        data["special_tokens"] = changes.pop("special_tokens")
    config = {"pattern": TEKKEN_PATTERN, "default_vocab_size": 267, "default_num_special_tokens": 10}
    data["config"] = config | changes
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match=message) as caught:
        from_tekken(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({PREFIX_KEY: "metaspace"}, "space_prefix is 'metaspace'; known are metaspace always, metaspace first"),
        ({NORMALIZER_KEY: "NFX"}, "normalizer is 'NFX'; known are NFC, NFD, NFKC, NFKD"),
        ({STRIP_KEYS["right"]: [3, 1000]}, "strip_right' names token 1000; the vocabulary has ids 0 to 256"),
        ({STRIP_KEYS["left"]: "x"}, "strip_left' must be an array of ids"),
    ],
)
def test_bad_metadata_of_our_own_is_one_clear_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*byte_alphabet(), "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    path = write_vocabulary(tmp_path / "v.gguf", metadata | changes)
    with pytest.raises(ModelFileError, match=message) as caught:
        Tokenizer.from_gguf(GGUFFile(path))
    assert "\n" not in str(caught.value)
