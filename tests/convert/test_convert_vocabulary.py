"""Vocabularies of real models, and which pre-tokenizers are recognised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType

from slimrt.convert import convert_checkpoint
from slimrt.convert.pretokenizer import name_pre_tokenizer
from slimrt.convert.ranks import from_tiktoken
from slimrt.convert.vocabulary import Vocabulary, from_sentencepiece, from_tokenizer_json
from slimrt.errors import TokenizerError
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile
from tests.convert_cases import checkpoint, edit_json
from tests.vocabularies import LLAMA3_PATTERN, llama3_metadata, sentencepiece_metadata, vocabulary_bytes


def test_llama3_ranks_give_the_tokens_and_merges_of_converters(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabulary_bytes("llama3"))
    vocabulary, expected = from_tiktoken(path, 128256), llama3_metadata()
    assert vocabulary.tokens == list(expected["tokenizer.ggml.tokens"])
    assert vocabulary.merges == list(expected["tokenizer.ggml.merges"])
    assert len(vocabulary.merges) == 280147  # as in the tokenizer.json that Meta publishes
    assert vocabulary.types == [TokenType.NORMAL] * 128000 + [TokenType.CONTROL] * 256
    vocabulary.find_turn_ends()
    assert vocabulary.special == {"bos": 128000, "eos": 128001, "pad": 128004, "eot": 128009, "eom": 128008}


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
def test_sentencepiece_models(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabulary_bytes(name))
    vocabulary, expected = from_sentencepiece(path), sentencepiece_metadata(name)
    assert vocabulary.tokens == list(expected["tokenizer.ggml.tokens"])
    assert vocabulary.scores == list(expected["tokenizer.ggml.scores"])
    assert [int(kind) for kind in vocabulary.types] == list(expected["tokenizer.ggml.token_type"])
    assert vocabulary.add_space_prefix is True


def test_the_default_models_vocabulary_survives_a_tokenizer_json(default_model: Path, tmp_path: Path) -> None:
    metadata = GGUFFile(default_model).metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist()
    control = [i for i, kind in enumerate(types) if kind == TokenType.CONTROL]
    definition = {
        "added_tokens": [{"id": i, "content": tokens[i], "special": True} for i in control],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    vocabulary = from_tokenizer_json(tmp_path / "tokenizer.json")
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", metadata["tokenizer.ggml.pre"])
    assert vocabulary.tokens == tokens and vocabulary.merges == metadata["tokenizer.ggml.merges"]
    assert [int(kind) for kind in vocabulary.types] == types


def test_tokenizer_json_of_a_sentencepiece_model_tokenises_the_same(tmp_path: Path) -> None:
    """Scores derived from the merges lead to the same tokens as the model's own scores."""
    from tokenizers import Tokenizer as Reference

    folder = checkpoint("hf-llama-linear")
    convert_checkpoint(folder, tmp_path / "model.gguf")
    ours = Tokenizer.from_gguf(GGUFFile(tmp_path / "model.gguf"))
    theirs = Reference.from_file(str(folder / "tokenizer.json"))
    for text in [
        "the other one went there",
        "quick quiet  queue",
        "number numbers numb",
        "ööö König Kö",
        "x" * 50,
        "狐",
    ]:
        assert ours.encode(text) == theirs.encode(text).ids, text


def _split(expression: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("definition", "ignore_merges", "name"),
    [
        (_split(LLAMA3_PATTERN), True, "llama-bpe"),
        (_split(LLAMA3_PATTERN), False, "dbrx"),
        (_split(LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")), False, "qwen2"),
        (_GPT2, False, "gpt-2"),
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]},
            False,
            "smollm",
        ),
    ],
)
def test_pre_tokenizers_by_structure(definition: dict[str, Any], ignore_merges: bool, name: str) -> None:
    tokenizer = {"pre_tokenizer": definition, "model": {"ignore_merges": ignore_merges}}
    assert name_pre_tokenizer(tokenizer, Path("tokenizer.json"), merges_whole=bool) == name


@pytest.mark.parametrize(
    "definition",
    [
        None,
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True},
        _split(LLAMA3_PATTERN + "|x"),
        _split(LLAMA3_PATTERN)["pretokenizers"][0] | {"invert": True},
        {"type": "Sequence", "pretokenizers": [_GPT2, {"type": "Digits", "individual_digits": True}]},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, _GPT2]},
    ],
)
def test_unknown_pre_tokenizers_are_refused(definition: Any) -> None:
    with pytest.raises(TokenizerError, match=r"has no name in GGUF.*known are bailingmoe, bloom"):
        name_pre_tokenizer({"pre_tokenizer": definition, "model": {}}, Path("tokenizer.json"), merges_whole=bool)


def test_padding_and_left_out_tokens() -> None:
    def vocabulary() -> Vocabulary:
        types = [TokenType.NORMAL, TokenType.NORMAL, TokenType.CONTROL]
        return Vocabulary("llama", "default", ["a", "b", "</s>"], types, [0.0, -1.0, 0.0], special={"eos": 2})

    padded = vocabulary()
    padded.resize(5, Path("t"))
    assert padded.tokens == ["a", "b", "</s>", "[PAD3]", "[PAD4]"]
    assert padded.types[3:] == [TokenType.UNUSED] * 2 and padded.scores == [0.0, -1.0, 0.0, -10000.0, -10000.0]
    cut = vocabulary()
    cut.resize(2, Path("t"))
    assert cut.tokens == ["a", "b"] and cut.special == {}
    with pytest.raises(TokenizerError, match="has 2 tokens and the embedding 1 rows"):
        vocabulary().resize(1, Path("t"))


def test_added_tokens_and_roles_of_a_sentencepiece_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("hf-mistral"), folder)
    (folder / "added_tokens.json").write_text('{"<tool>": 382}')
    edit_json(
        folder / "tokenizer_config.json",
        added_tokens_decoder={"383": {"content": "<|im_end|>", "special": True}},
        eos_token={"content": "<|im_end|>"},
        add_eos_token=True,
        add_prefix_space=False,
    )
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<tool>", "eos_token": "</s>"}')
    convert_checkpoint(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    value = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}
    assert value["tokens"][382:] == ["<tool>", "<|im_end|>"]
    assert value["token_type"][382:] == [TokenType.USER_DEFINED, TokenType.CONTROL]
    assert (value["eos_token_id"], value["eot_token_id"], value["padding_token_id"]) == (383, 383, 382)
    assert (value["add_bos_token"], value["add_eos_token"], value["add_space_prefix"]) == (True, True, False)
