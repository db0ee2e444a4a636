"""The vocabulary in a GGUF file: entries, their types, special ids, and which tokens end a generation.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md ("Tokenizer"). Which tokens end a generation and which
entries count as control tokens whatever the file says is decided by their text, as in llama.cpp's ``llama-vocab.cpp``.
"""

from __future__ import annotations

import re

import numpy as np
from gguf.constants import TokenType

from slimrt.errors import ModelFileError
from slimrt.weights.gguf import GGUFFile

__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "Vocabulary"]

NORMAL, UNKNOWN, CONTROL = int(TokenType.NORMAL), int(TokenType.UNKNOWN), int(TokenType.CONTROL)
USER_DEFINED, UNUSED, BYTE = int(TokenType.USER_DEFINED), int(TokenType.UNUSED), int(TokenType.BYTE)

# Entries that end a generation wherever they occur in a vocabulary.
_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip

# Fill-in-the-middle tokens: metadata keys, texts that name one where no key does, whether it ends a generation.
_INFILL: tuple[tuple[str, str, bool], ...] = (
    (
        "fim_pre prefix",
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
        False,
    ),
    (
        "fim_suf suffix",
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
        False,
    ),
    (
        "fim_mid middle",
        "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
        False,
    ),
    ("fim_pad", "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]", True),
    ("fim_rep", "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>", True),
    ("fim_sep", "<|file_sep|>", True),
)

_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss writes its answer between these
_BYTE_TEXT = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The entries of a vocabulary and what they mean.

    ``tokens``: text per id; ``types``: token type per id; ``ids``: id per text; ``byte_values``: the byte that each
    entry of type byte stands for. ``bos_id``, ``eos_id``: None where there is none. ``stop_ids``: tokens that end a
    generation. ``chat_template``: the file's own; ``named_chat_templates``: those for special uses. ``pre``: name of
    the pre-tokenizer, None where the file has none.

    Raises ModelFileError where entries are missing or duplicate, arrays too short, or special ids outside.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.path = file.path
        self.tokens = self.text_list("tokenizer.ggml.tokens")
        if not self.tokens:
            raise ModelFileError(
                f"{self.path}: tokenizer.ggml.tokens is empty; a vocabulary has entries; convert the model again"
            )
        if "" in self.tokens:
            self.tokens = [text or f"[EMPTY_{id}]" for id, text in enumerate(self.tokens)]
        self.ids = {text: id for id, text in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            id, text = next((id, text) for id, text in enumerate(self.tokens) if self.ids[text] != id)
            raise ModelFileError(
                f"{self.path}: vocabulary entry {text[:80]!r} occurs twice, as {id} and {self.ids[text]}; "
                "entries are unique; convert the model again"
            )
        types = self.numbers("tokenizer.ggml.token_type", kinds="iu")
        self.types: list[int] = [NORMAL] * len(self.tokens) if types is None else types.tolist()
        self.byte_values = {id: self._byte_value(id) for id, kind in enumerate(self.types) if kind == BYTE}
        self.pre = self.text("tokenizer.ggml.pre")
        self.chat_template = self.text("tokenizer.chat_template")
        begin = "tokenizer.chat_template."
        self.named_chat_templates = {
            key.removeprefix(begin): file.get(key, str) for key in file.metadata if key.startswith(begin)
        }
        # The SentencePiece defaults are LLaMA's; byte-level vocabularies have none.
        spm = file.get("tokenizer.ggml.model", str) == "llama"
        self.bos_id = self.special_id("bos", 1 if spm else None)
        self.eos_id = self.special_id("eos", 2 if spm else None)
        self.stop_ids = self._find_stop_ids()

    def text(self, key: str) -> str | None:
        """The metadata text called ``key``, or None if there is none."""
        return self._file.get(key, str) if key in self._file.metadata else None

    def text_list(self, key: str) -> list[str]:
        """The metadata array of strings called ``key``; raises ModelFileError if there is none."""
        value = self._file.metadata.get(key)
        if not isinstance(value, list) or not isinstance(value[0] if value else "", str):  # arrays are of one type
            raise ModelFileError(
                f"{self.path}: metadata key '{key}' is {'missing' if value is None else 'not an array of strings'}; "
                "this tokenizer requires it; convert the model again"
            )
        return value

    def numbers(self, key: str, kinds: str) -> np.ndarray | None:
        """The metadata array of numbers called ``key``, one per entry, or None if there is none.

        ``kinds``: the NumPy kinds allowed, such as "iu". Raises ModelFileError for another array or too short a one.
        """
        value = self._file.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or len(value) < len(self.tokens):
            raise ModelFileError(
                f"{self.path}: metadata key '{key}' must be an array of {len(self.tokens)} numbers, one per vocabulary "
                "entry; the file is corrupt; convert the model again"
            )
        return value[: len(self.tokens)]

    def id_list(self, key: str) -> list[int] | None:
        """The metadata array of token ids called ``key``, or None if there is none; raises ModelFileError."""
        value = self._file.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or not len(value):
            raise ModelFileError(f"{self.path}: metadata key '{key}' must be an array of ids; convert the model again")
        wrong = value[(value < 0) | (value >= len(self.tokens))]
        if len(wrong):
            raise ModelFileError(
                f"{self.path}: metadata key '{key}' names token {wrong[0]}; the vocabulary has ids 0 to "
                f"{len(self.tokens) - 1}; convert the model again"
            )
        return value.tolist()

    def flag(self, key: str, default: bool) -> bool:
        """The metadata switch ``tokenizer.ggml.{key}``."""
        return self._file.get(f"tokenizer.ggml.{key}", bool, default)

    def stated(self, key: str) -> bool:
        """The metadata switch ``key``, off where it is missing."""
        return self._file.get(key, bool, False)

    def special_id(self, name: str, default: int | None = None) -> int | None:
        """The id under ``tokenizer.ggml.{name}_token_id``; raises ModelFileError if it lies outside the vocabulary."""
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self._file.metadata:
            return default if default is not None and default < len(self.tokens) else None
        id = self._file.get(key, int)
        if not 0 <= id < len(self.tokens):
            raise ModelFileError(
                f"{self.path}: {key} is {id}; the vocabulary has ids 0 to {len(self.tokens) - 1}; "
                "convert the model again"
            )
        return id

    def plain_bytes(self, id: int) -> bytes | None:
        """The bytes that token ``id`` stands for by its kind alone; None for those whose text is written in the way of
        their tokenizer."""
        kind = self.types[id]
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return self.tokens[id].encode()
        if kind == BYTE:
            return self.byte_values[id]
        return b"" if kind == UNUSED else None

    def _byte_value(self, id: int) -> bytes:
        match = _BYTE_TEXT.fullmatch(self.tokens[id])
        if match is None:
            raise ModelFileError(
                f"{self.path}: vocabulary entry {id}, {self.tokens[id][:80]!r}, is of type byte; such entries read "
                "<0x00> to <0xFF>; convert the model again"
            )
        return bytes.fromhex(match[1])

    def _find_stop_ids(self) -> frozenset[int]:
        stops = {self.ids[text] for text in _END_TEXTS if text in self.ids}
        control = set(stops)
        for names, texts, ends in _INFILL:
            keyed = next((id for id in map(self.special_id, names.split()) if id is not None), None)
            found = [self.ids[text] for text in texts.split() if text in self.ids][:1] if keyed is None else []
            control.update(found)
            if ends:
                stops.update(found if keyed is None else [keyed])
        for id in control:
            self.types[id] = CONTROL
        for text in _ALWAYS_SHOWN:
            if text in self.ids:
                self.types[self.ids[text]] = USER_DEFINED
        stops.update(id for id in (self.eos_id, self.special_id("eot"), self.special_id("eom")) if id is not None)
        return frozenset(self._without_exceptions(stops))

    def _without_exceptions(self, stops: set[int]) -> set[int]:
        texts = {self.tokens[id] for id in stops}
        calls, closes = texts & {"<|call|>", "<|calls|>"}, texts & {"<|return|>", "<|flush|>"}
        if "<|end|>" in texts and calls and closes:
            # Here <|end|> closes one message of several (o200k_harmony, solar-open).
            stops.discard(self.ids["<|end|>"])
            self.types[self.ids["<|end|>"]] = USER_DEFINED
        if "</s>" in texts and texts & {"<|tool_response>", "<|plamo:eos|>"}:
            stops.discard(self.ids["</s>"])
            self.types[self.ids["</s>"]] = NORMAL
        return stops
