"""Writes llama_cpp.json: what llama.cpp makes of hard texts with real vocabularies and with every pre-tokenizer.

Made with llama-cpp-python 0.3.36 (gguf 0.19, sentencepiece 0.2.3), from the repository root:

    PYTHONPATH=. python tests/goldens/tokenizer/make.py SmolLM2-135M-Instruct.Q4_1.gguf path/to/llama.cpp/models

The second folder holds llama.cpp's own test vectors (ggml-vocab-llama-bpe.gguf.inp and .out), which are copied.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp

from tests.vocabularies import llama3_metadata, metadata_of, sentencepiece_metadata, write_vocabulary

TEXTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "a\0b",
    " \0 ",
    "Hello world",
    " Hello",
    "Hello ",
    "  Hello  ",
    "I'M you'll WE'VE it's 's 'S s' ' s don't DON'T d'accord l'été",
    "1",
    "12",
    "123",
    "1234",
    "12345",
    "2024-1999",
    "10000 100000",
    "12345678901234567890",
    "3.14159 1,000,000 ½ ² ٣٤٥ १२३ 〇一二 Ⅳ ①",
    " 1 22  333",
    "a1b2c3",
    "x" * 200,
    " " * 70 + "x",
    "\n" * 50 + "x\n",
    " \n \n\n\t\tx",
    "\u00a0\u00a0x\u2003y\u3000z\u0085w",
    "a\u2028b\u2029c",
    "  \n  a",
    "a  \n",
    "\r\r\n\n\r x",
    "Ελληνικά κείμενο",
    "Русский текст: привет, мир!",
    "العربية نص عَرَبِيّ ٪؟،",
    "עברית שָׁלוֹם",
    "हिन्दी में पाठ क्षत्रिय",
    "বাংলা লেখা",
    "ไทยภาษาไทย",
    "中文文本，测试。",
    "日本語のテキストです。カタカナ",
    "한국어 텍스트 한글",
    "Tiếng Việt có dấu",
    "ქართული",
    "አማርኛ",
    "தமிழ்",
    "ខ្មែរ",
    "မြန်မာ",
    "😀😃👨‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽",
    "🙂\n\n🙂  🙂",
    "e\u0301 vs é n\u0303 \u0301\u0302\u0303",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘",
    "İstanbul ǅ ŉ ﬁ ß ẞ ſ",
    "ａｂｃ１２３",
    "\ufeffBOM",
    "\ufffd\ufffe",
    "\u200b\u200c\u200d",
    "\U0010ffff\U000e0001",
    "▁ under ▁▁ lower",
    "ĠĊ",
    "\x01\x1f\x7f\x80\x9f",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>a</s><unk> </s>  b",
    "text <|endoftext|> more <|eot_id|>",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nx",
    "<|im_end",
    "<<|im_end|>>",
    "<repo_name>x<file_sep>",
    "[INST] hi [/INST]",
    "[TOOL_CALLS][",
    "def f(x):\n    return x**2 + 1  # comment\n\n\nclass A:\n\tpass\n",
    "http://example.com/a?b=c&d=%20#x",
    "a,b;c:d!e?f…g—h–i",
    "!!!???...",
    "$100 €200 £3 + = < > ^ ~ | `",
    "snake_case camelCase PascalCase SCREAMING",
    "0x1F 1e-5 -3 +4 file/path//x",
]

# Names of the rules that follow llama.cpp to the letter; tekken, gpt-4o and others do not (see slimrt/text/pre.py).
PRE_TOKENIZERS = [
    "default",
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "pixtral",
    "glm4",
    "dbrx",
    "smaug-bpe",
    "chatglm-bpe",
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
    "qwen2",
    "deepseek-r1-qwen",
    "stablelm2",
    "megrez",
    "grok-2",
    "qwen35",
    "gpt-2",
    "phi-2",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "gigachat",
    "mellum",
    "exaone4",
    "seed-coder",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "hunyuan-dense",
    "falcon",
    "falcon-h1",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "glm5",
    "mellum2",
    "kormo",
    "f2llmv2",
    "hunyuan",
    "solar-open",
    "granite-docling",
    "a.x-4.0",
    "modern-bert",
    "roberta-bpe",
    "jina-es",
    "jina-de",
    "jina-v1-en",
    "jina-v2-es",
    "jina-v2-de",
    "jina-v2-code",
    "joyai-llm",
    "hy_v4",
    "jais-2",
    "ufakzeka",
    "minicpm5",
    "bailingmoe",
    "bailingmoe2",
    "llada-moe",
    "exaone-moe",
    "spark2_5",
    "bloom",
    "poro-chat",
    "gpt3-finnish",
    "viking",
    "chameleon",
    "superbpe",
    "laguna",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(2)
    pools = [
        range(32, 127), [32, 10, 13, 9, 0xA0, 0x2003], range(0xA1, 0x250), range(0x300, 0x370), range(0x390, 0x3C9),
        range(0x410, 0x450), range(0x5D0, 0x5EB), range(0x904, 0x93A), range(0xE01, 0xE3B), range(0x2010, 0x2028),
        range(0x3041, 0x3097), range(0x4E00, 0x4F00), range(0xAC00, 0xAD00), range(0x1F600, 0x1F650),
        [*range(48, 58), 0x663, 0xBD, 0x2460], [39, 115, 116, 82, 69],
    ]  # fmt: skip
    texts = []
    for _ in range(count):
        chosen = rng.sample(pools, rng.choice([1, 2, 3]))
        texts.append("".join(chr(rng.choice(rng.choice(chosen))) for _ in range(rng.randrange(1, 40))))
    return texts


def results(path: Path, texts: list[str]) -> dict[str, Any]:
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocab = model._model.vocab
    stops = [id for id in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, id)]
    raw = [text.encode() for text in texts]
    return {
        "stop_ids": stops,
        "bos": model.token_bos(),
        "eos": model.token_eos(),
        "plain": [model.tokenize(text, add_bos=False, special=False) for text in raw],
        "special": [model.tokenize(text, add_bos=True, special=True) for text in raw],
        "pieces": {id: piece(vocab, id).hex() for id in range(0, model.n_vocab(), 211)},
    }


def piece(vocab: Any, id: int) -> bytes:
    buffer = bytes(1024)
    length = llama_cpp.llama_token_to_piece(vocab, id, buffer, len(buffer), 0, True)
    return buffer[:length]


def vectors(stem: Path) -> list[tuple[str, list[int]]]:
    texts = stem.with_name(stem.name + ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = stem.with_name(stem.name + ".out").read_text().split("\n")
    return [(text, [int(id) for id in line.split()]) for text, line in zip(texts, lines, strict=True)]


def main(default_model: str, llama_cpp_models: str) -> None:
    texts = TEXTS + random_texts(40)
    small = llama3_metadata(20_000)
    models = {
        "smollm2": metadata_of(Path(default_model)),
        "llama3": llama3_metadata(),
        "mistral-v1": sentencepiece_metadata("mistral-v1"),
        "mistral-v3": sentencepiece_metadata("mistral-v3"),
    }
    pre: dict[str, int] = {}
    pre_ids: list[list[list[int]]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        goldens: dict[str, Any] = {"llama_cpp_python": llama_cpp.__version__, "texts": texts, "models": {}}
        for name, metadata in models.items():
            goldens["models"][name] = results(write_vocabulary(path, metadata), texts)
        for name in PRE_TOKENIZERS:
            # This vocabulary has tokens of several digits, which SmolLM2's has not.
            ids = results(write_vocabulary(path, {**small, "tokenizer.ggml.pre": name}), texts)["plain"]
            if ids not in pre_ids:
                pre_ids.append(ids)
            pre[name] = pre_ids.index(ids)
    goldens["pre"], goldens["pre_ids"] = pre, pre_ids
    goldens["vectors_llama_bpe"] = vectors(Path(llama_cpp_models) / "ggml-vocab-llama-bpe.gguf")
    out = Path(__file__).with_name("llama_cpp.json")
    out.write_text(json.dumps(goldens, separators=(",", ":"), ensure_ascii=True) + "\n")
    print(f"{out}: {out.stat().st_size} bytes, {len(texts)} texts, {len(pre_ids)} different pre-tokenizers")


if __name__ == "__main__":
    main(*sys.argv[1:])
