"""The tokenizers of model families, from tokenizer.json or a SentencePiece model to ids, against the libraries.

Vocabularies are small ones, trained here with the families' own rules, which are written out below as their
tokenizer.json files have them; where a package brings the real one, that is used.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from slimrt.convert.special_tokens import read_special_tokens
from slimrt.convert.tekken import from_tekken
from slimrt.convert.vocabulary import Vocabulary, from_sentencepiece, from_tokenizer_json
from slimrt.text.pre import PRE_TOKENIZERS
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile
from tests.text.test_tokenizer_references import O200K_PATTERN, QWEN2_PATTERN, TEXTS
from tests.vocabularies import LLAMA3_PATTERN, metadata_of, vocabulary_bytes, write_vocabulary

TEXTS_OF_MANY_SCRIPTS: list[str] = json.loads(
    (Path(__file__).parents[1] / "goldens/tokenizer/llama_cpp.json").read_text()
)["texts"]

DEEPSEEK_V3_PATTERNS = (  # DeepSeek-V3's tokenizer.json
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
DEEPSEEK_CODER_PATTERNS = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")  # deepseek-coder
QWEN35_PATTERN = QWEN2_PATTERN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"
)
SEED_PATTERN = (  # Seed-Coder-8B
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+"
    "|\\s+(?!\\S)|\\s+"
)
BAILING_PATTERN = (  # Ling-lite
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
EXAONE_MOE_PATTERN = (  # K-EXAONE
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
TEKKEN_PATTERN = json.loads(vocabulary_bytes("tekken"))["config"]["pattern"]
BLOOM_PATTERN = " ?[^(\\s|[.,!?…。，、।۔،])]+"
DIGITS = {"type": "Digits", "individual_digits": True}


def split(*expressions: str) -> dict[str, Any]:
    steps = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in expressions
    ]
    return sequence(*steps, byte_level(use_regex=False))


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


# Family -> (pre-tokenizer, normalizer, ignore_merges, the name that llama.cpp has for the rule).
FAMILIES: dict[str, tuple[dict[str, Any], str | None, bool, str]] = {
    "llama3, smollm3": (split(LLAMA3_PATTERN), None, True, "llama-bpe"),
    "qwen2, qwen3": (split(QWEN2_PATTERN), "NFC", False, "qwen2"),
    "qwen3.5": (split(QWEN35_PATTERN), "NFC", False, "qwen35"),
    "olmo2, granite4": (split(LLAMA3_PATTERN), None, False, "dbrx"),
    "granite3, exaone, starcoder": (sequence(DIGITS, byte_level(use_regex=True)), None, False, "smollm"),
    "command-r": (sequence(DIGITS, byte_level(use_regex=True)), "NFC", False, "smollm"),
    "phi-4-mini": (split(O200K_PATTERN), None, False, "gpt-4o"),
    "gpt-oss": (split(O200K_PATTERN), None, True, "gpt-4o"),
    "mistral-nemo, ministral": (split(TEKKEN_PATTERN), None, False, "tekken"),
    "gpt-2, exaone4": (byte_level(use_regex=True), None, False, "gpt-2"),
    "deepseek-v3": (split(*DEEPSEEK_V3_PATTERNS), None, False, "deepseek-v3"),
    "deepseek-coder": (
        sequence(*split(*DEEPSEEK_CODER_PATTERNS)["pretokenizers"][:-1], DIGITS, byte_level(use_regex=False)),
        None, False, "deepseek-coder",
    ),
    "seed-coder": (split(SEED_PATTERN), None, False, "seed-coder"),
    "ling": (split(BAILING_PATTERN), None, False, "bailingmoe"),
    "exaone-moe": (split(EXAONE_MOE_PATTERN), None, False, "exaone-moe"),
    "tiny-aya": (split(r"\d{1,3}(?=(?:\d{3})*\b)", O200K_PATTERN), None, False, "tiny_aya"),
    "superbpe": (split(r"\p{N}+", r"(?=(\d{3})+(?!\d))"), None, False, "superbpe"),
}  # fmt: skip


def trained(definition: dict[str, Any], normalizer: str | None, ignore_merges: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE of a few hundred entries."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    described = json.loads(tokenizer.to_str()) | {"pre_tokenizer": definition}
    described["normalizer"] = normalizer and {"type": normalizer}
    described["model"]["ignore_merges"] = ignore_merges
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<|end|>", special=True, normalized=False)],
    )
    # No entry may look like a control token, which is found in text before anything is cut.
    tokenizer.train_from_iterator([text for text in TEXTS_OF_MANY_SCRIPTS if "<" not in text], trainer)
    return tokenizer


def loaded(vocabulary: Vocabulary, path: Path, arch: str = "llama") -> Tokenizer:
    """``vocabulary`` written to a file and read again."""
    writer = gguf.GGUFWriter(path, arch)
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Tokenizer.from_gguf(GGUFFile(path))


def converted(reference: tokenizers.Tokenizer, folder: Path) -> tuple[Vocabulary, Tokenizer]:
    path = folder / "tokenizer.json"
    reference.save(str(path))
    vocabulary = from_tokenizer_json(path)
    return vocabulary, loaded(vocabulary, folder / "vocabulary.gguf")


def check_equal(ours: Tokenizer, reference: tokenizers.Tokenizer, examples: int = 20) -> None:
    def check(text: str) -> None:
        assert ours.encode(text, add_bos=False, special=True) == reference.encode(text, add_special_tokens=False).ids

    for text in TEXTS_OF_MANY_SCRIPTS:
        if "ſ" not in text:  # (?i:'s) takes it for an s, and llama.cpp does not
            check(text)
    settings(max_examples=examples)(given(text=TEXTS)(check))()


@pytest.mark.parametrize("family", FAMILIES)
def test_byte_level_families_equal_tokenizers(family: str, tmp_path: Path) -> None:
    definition, normalizer, ignore_merges, name = FAMILIES[family]
    reference = trained(definition, normalizer, ignore_merges)
    vocabulary, ours = converted(reference, tmp_path)
    assert vocabulary.pre == name
    check_equal(ours, reference)


@pytest.mark.parametrize(
    ("names", "expressions"),
    [
        ("laguna", ["[^\\n]+|[\\n]+", QWEN2_PATTERN]),
        ("minicpm5", [r"\p{N}{1,3}", LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}+")]),
        ("ufakzeka", [QWEN2_PATTERN.removeprefix("(?i:'s|'t|'re|'ve|'m|'ll|'d)|")]),
        ("kimi-k2", [  # Moonshot's tokenization_kimi.py; the library writes an intersection with a lookahead
            r"[\p{Han}]+|"
            + O200K_PATTERN.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace(r"[\r\n/]*", r"[\r\n]*")
        ]),
        ("jais-2", [LLAMA3_PATTERN.removesuffix(r"\s+(?!\S)|\s+") + r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|"
                    r"\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"]),
        ("bloom poro-chat", [BLOOM_PATTERN]),
        ("viking", [BLOOM_PATTERN, r"\p{N}"]),
        ("afmoe", [r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
                   "[一-鿿㐀-䶿\uf900-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdf\u0e00-\u0e7f\u0e80-\u0effក-\u17ffက-႟"
                   "ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+", DEEPSEEK_V3_PATTERNS[2]]),
        ("spark2_5", [*DEEPSEEK_V3_PATTERNS[:2],
                      DEEPSEEK_V3_PATTERNS[2].replace("[\r\n]*|\\s*[\r\n]+", "|[\r\n]"), r"\p{N}"]),
        ("youtu", ["[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
                   O200K_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")]),
        ("chameleon", ["<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}",
                       r"[\p{P}!-/:-@\[-`{-~]",
                       r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]),
    ],
)  # fmt: skip
def test_other_rules_cut_where_the_library_does(names: str, expressions: list[str]) -> None:
    steps = [pre_tokenizers.Split(tokenizers.Regex(expression), "isolated") for expression in expressions]
    reference = pre_tokenizers.Sequence(steps)

    def check(text: str) -> None:
        for name in names.split():
            assert PRE_TOKENIZERS[name].split(text) == [piece for piece, _ in reference.pre_tokenize_str(text)], name

    for text in (*TEXTS_OF_MANY_SCRIPTS, "<sentinel:12>IMGIMGABCZ  \t\n x1234567y 12345 a_1234 ½12345 " + " " * 700):
        if "ſ" not in text:
            check(text)
    settings(max_examples=20)(given(text=TEXTS)(check))()


def test_real_tekken_equals_tiktoken(tmp_path: Path) -> None:
    """Its first ranks: all of them take ten seconds."""
    size = 20_000
    raw = json.loads(vocabulary_bytes("tekken"))
    raw["config"]["default_vocab_size"] = 1000 + size
    (tmp_path / "tekken.json").write_text(json.dumps(raw))
    vocabulary = from_tekken(tmp_path / "tekken.json")
    assert (vocabulary.pre, len(vocabulary.tokens)) == ("tekken", 1000 + size)
    assert vocabulary.tokens[:4] == ["<unk>", "<s>", "</s>", "[INST]"] and vocabulary.special["bos"] == 1
    ours = loaded(vocabulary, tmp_path / "tekken.gguf")
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in raw["vocab"][:size]}
    reference = tiktoken.Encoding("tekken", pat_str=raw["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})

    def check(text: str) -> None:
        assert ours.encode(text, add_bos=False) == [1000 + rank for rank in reference.encode_ordinary(text)]

    for text in TEXTS_OF_MANY_SCRIPTS:
        check(text)
    given(text=TEXTS)(check)()
    assert ours.encode("a") == [1, *ours.encode("a", add_bos=False)]


def gemma(prefix: bool = False) -> bytes:
    """A SentencePiece model with Gemma's options: user-defined runs of spaces and line ends, bytes for the rest."""
    model = io.BytesIO()
    spaces = [] if prefix else ["▁▁", "▁▁▁", "▁▁▁▁"]
    texts = [text for text in TEXTS_OF_MANY_SCRIPTS if "<" not in text and "\0" not in text]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<mask>", "<start_of_turn>", "\n", "\n\n", "\n\n\n", "<table>", *spaces],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_with_gemmas_options(prefix: bool, tmp_path: Path) -> None:
    raw = gemma(prefix)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    vocabulary = from_sentencepiece(tmp_path / "tokenizer.model")
    assert vocabulary.add_space_prefix is prefix and vocabulary.remove_extra_spaces is False
    defined = [text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == 4]
    assert ("    " in defined) is not prefix and "\n\n" in defined
    ours = loaded(vocabulary, tmp_path / "gemma.gguf")
    reference = sentencepiece.SentencePieceProcessor(model_proto=raw)

    def check(text: str) -> None:
        if "▁" in text:
            return  # user-defined runs of spaces are looked for as spaces, as in llama.cpp
        if prefix and any(piece in text for piece in ("<", "\n")):
            return  # between special tokens every text gets a space in front, as in llama.cpp; the library gives one
        ids = ours.encode(text, add_bos=False)
        assert ids == reference.encode(text)
        assert ours.decode([1, *ids]) == text

    for text in (*TEXTS_OF_MANY_SCRIPTS, "a  b   c     d", "x\n\n\n\ny", "<table> <start_of_turn>user\n"):
        check(text)
    settings(max_examples=30)(given(text=TEXTS)(check))()


def test_extra_spaces_go_where_the_model_says_so(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the other one went there and back again"] * 9), model_writer=model, model_type="bpe",
        vocab_size=60, normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    vocabulary = from_sentencepiece(tmp_path / "tokenizer.model")
    assert vocabulary.remove_extra_spaces is True
    ours = loaded(vocabulary, tmp_path / "v.gguf")
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("the one", "  the   one  ", "", " ", "there  "):
        assert ours.encode(text, add_bos=False) == reference.encode(text)


def test_blanks_beside_added_tokens_go_as_the_file_says(tmp_path: Path) -> None:
    """Phi-3's markers take the blanks behind them; GGUF has no key for it, so slimrt writes one of its own."""
    reference = trained(split(LLAMA3_PATTERN), None, ignore_merges=False)
    reference.add_special_tokens(
        [
            AddedToken("<|user|>", rstrip=True, normalized=False, special=True),
            AddedToken("<mask>", lstrip=True, normalized=False, special=True),
        ]
    )
    vocabulary, ours = converted(reference, tmp_path)
    assert vocabulary.strip == {
        "left": [reference.token_to_id("<mask>")], "right": [reference.token_to_id("<|user|>")]
    }  # fmt: skip
    for text in (
        "<|user|>\n Hi <mask> there", "a <|user|>  <mask> b", "<mask><|user|>",
        " \u00a0<mask>\u3000<|user|>\u3000\u200b", "<|user|> <|user|> <|end|> x <|end|>",
    ):  # fmt: skip
        assert ours.encode(text, special=True, add_bos=False) == reference.encode(text, add_special_tokens=False).ids


def test_bpe_of_characters(tmp_path: Path) -> None:
    """Gemma 4: merges over characters, a low line for a space, lines apart, bytes for what the vocabulary lacks."""
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    reference = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    reference.normalizer = normalizers.Replace(" ", "▁")
    reference.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("[^\\n]+|[\\n]+"), "isolated")
    texts = ["the other one went there", "and back again ", "übermäßig 中文中文", "a\n\nb\n", "it was there again"]
    reference.train_from_iterator(texts * 3, trainer)
    vocab = json.loads(reference.to_str())["model"]
    tokens = sorted(vocab["vocab"], key=vocab["vocab"].__getitem__)
    byte_entry, control = gguf.TokenType.BYTE, gguf.TokenType.CONTROL
    types = [int(control)] * 3 + [int(byte_entry)] * 256 + [int(gguf.TokenType.NORMAL)] * (len(tokens) - 259)
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in vocab["merges"]],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
    }
    ours = Tokenizer.from_gguf(GGUFFile(write_vocabulary(tmp_path / "gemma4.gguf", metadata)))
    assert ours.encode("one")[0] == 2
    reference.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    def check(text: str) -> None:
        if "<" not in text:  # the library takes a spelt byte entry for one
            ids = ours.encode(text, add_bos=False)
            assert ids == reference.encode(text, add_special_tokens=False).ids
            assert ours.decode(ids) == text.replace("▁", " ")

    for text in (*TEXTS_OF_MANY_SCRIPTS, *texts):
        check(text)
    settings(max_examples=30)(given(text=TEXTS)(check))()


def character_bpe(pre_tokenizer: dict[str, Any] | None, normalizer: dict[str, Any] | None) -> tokenizers.Tokenizer:
    """A BPE of characters with byte entries, as LLaMA's and Phi-3's tokenizer.json are, of a few hundred entries."""
    learnt = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [text for text in TEXTS_OF_MANY_SCRIPTS if "<" not in text]
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=["▁"])
    learnt.train_from_iterator(texts, trainer)
    described = json.loads(learnt.to_str())
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    entries += sorted(described["model"]["vocab"], key=described["model"]["vocab"].__getitem__)
    described["model"]["vocab"] = {text: id for id, text in enumerate(entries)}
    described["pre_tokenizer"], described["normalizer"] = pre_tokenizer, normalizer
    described["added_tokens"] = [
        {"id": id, "content": entries[id], "special": True, "normalized": False, "single_word": False, "lstrip": False,
         "rstrip": False} for id in range(3)
    ]  # fmt: skip
    return tokenizers.Tokenizer.from_str(json.dumps(described))


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIXES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    **{
        f"{scheme}, by Metaspace": (
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}, None,
        )
        for scheme in ("always", "first", "never")
    },
    "always, by the normalizer": (
        None, {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]},
    ),
    "never, by the normalizer": (None, REPLACE),
}  # fmt: skip


@pytest.mark.parametrize("kind", PREFIXES)
def test_the_space_in_front_goes_where_the_library_puts_it(kind: str, tmp_path: Path) -> None:
    reference = character_bpe(*PREFIXES[kind])
    vocabulary, ours = converted(reference, tmp_path)
    assert vocabulary.add_space_prefix is not kind.startswith("never")

    def check(text: str) -> None:
        if "<0x" not in text and "\ufdd0" not in text:  # the library takes a spelt byte entry for one
            ids = ours.encode(text, add_bos=False, special=True)
            assert ids == reference.encode(text, add_special_tokens=False).ids

    for text in (
        *TEXTS_OF_MANY_SCRIPTS,
        "<s>the<s> other",
        " <s>▁x</s>  ",
        "  two  spaces ",
        "▁x",
        "\0x\0",
        "a</s>\n b",
    ):
        check(text)
    settings(max_examples=20)(given(text=TEXTS)(check))()


def test_a_sentencepiece_folder_says_where_blanks_go(tmp_path: Path) -> None:
    """Phi-3's tokenizer.model with its tokenizer_config.json: each marker takes the blanks behind it."""
    (tmp_path / "tokenizer.model").write_bytes(gemma(prefix=True))
    vocabulary = from_sentencepiece(tmp_path / "tokenizer.model", {900: ("<|user|>", True), 901: ("<|end|>", True)})
    decoder = {"900": {"content": "<|user|>", "special": True, "rstrip": True}, "901": {"content": "<|end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    read_special_tokens(tmp_path, vocabulary)
    assert vocabulary.strip == {"left": [], "right": [900]}
    path = tmp_path / "phi3.gguf"
    for arch in ("llama", "phi3"):  # the architecture alone would drop blanks behind both
        ours = loaded(vocabulary, path, arch)
        hi, end = ours.encode("Hi", add_bos=False), ours.encode(" \nHi", add_bos=False)
        assert ours.encode("<|user|> \nHi<|end|> \nHi", special=True, add_bos=False) == [900, *hi, 901, *end]
    metadata = {key: value for key, value in metadata_of(path).items() if key.startswith("tokenizer.")}
    phi3 = Tokenizer.from_gguf(GGUFFile(write_vocabulary(tmp_path / "elsewhere.gguf", metadata, "phi3")))
    assert phi3.encode("<|user|> \nHi<|end|> \nHi", special=True, add_bos=False) == [900, *hi, 901, *hi]
