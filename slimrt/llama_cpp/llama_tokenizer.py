"""The tokens of ``slimrt.Llama``: texts as bytes to ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimrt.errors import SettingError, TokenizerError
from slimrt.llama_cpp.missing import refuse
from slimrt.text.tokenizer import Tokenizer

__all__ = ["LlamaTokenizer", "LlamaTokens"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        refuse(name)
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


class LlamaTokenizer:
    """The tokenizer of a ``Llama``."""

    def __init__(self, llama: LlamaTokens) -> None:
        self._tokenizer = llama._tokenizer

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """UTF-8 bytes -> ids; ``add_bos`` lets the model's BOS and EOS in. Raises SettingError for other bytes."""
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise SettingError(f"byte {error.start} of the text is not UTF-8; tokenize takes UTF-8 bytes") from None
        return self._tokenizer.encode(decoded, special=special, add_bos=None if add_bos else False)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Ids -> bytes. ``prev_tokens`` changes nothing, as a token's bytes do not depend on what comes before."""
        return self._tokenizer.decode_bytes(tokens, special=special)

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        return self.tokenize(text.encode(errors="ignore"), add_bos, special)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.detokenize(tokens).decode(errors="ignore")


class LlamaTokens:
    """What a ``Llama`` does with its vocabulary alone."""

    _tokenizer: Tokenizer

    def tokenizer(self) -> LlamaTokenizer:
        return LlamaTokenizer(self)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """UTF-8 bytes -> ids; ``add_bos`` lets the model's BOS and EOS in. Raises SettingError for other bytes."""
        return LlamaTokenizer(self).tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        return LlamaTokenizer(self).detokenize(tokens, prev_tokens, special)

    def token_bos(self) -> int:
        return -1 if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    def token_eos(self) -> int:
        return -1 if self._tokenizer.eos_id is None else self._tokenizer.eos_id

    def token_nl(self) -> int:
        """The token of a line end: its own one, or the byte's."""
        try:
            return self._tokenizer.encode("\n", add_bos=False)[-1]
        except TokenizerError:
            return -1

    def n_vocab(self) -> int:
        return self._tokenizer.vocab_size

    @staticmethod
    def longest_token_prefix(a: Sequence[int], b: Sequence[int]) -> int:
        """How many tokens two sequences have in common at their beginnings."""
        return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
