"""Text to token ids and back, rebuilt from the metadata of a GGUF file alone.

What is one token, which control tokens exist and where spaces go follows llama.cpp, so that a model reads what it was
trained on: control tokens are recognised in text only where asked for, user-defined ones always.
"""

from __future__ import annotations

import codecs
import operator
import unicodedata
from collections.abc import Collection, Iterable
from typing import Literal, Protocol, cast

from slimrt.errors import ModelFileError, TokenizerError
from slimrt.text.bpe import ByteLevelBPE
from slimrt.text.pre import PRE_TOKENIZERS
from slimrt.text.raw_bpe import RawBPE
from slimrt.text.special import SpecialTokens
from slimrt.text.spm import SentencePieceBPE
from slimrt.text.vocab import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary
from slimrt.weights.gguf import GGUFFile

__all__ = [
    "NORMALIZER_KEY",
    "PREFIXES",
    "PREFIX_KEY",
    "STRIP_KEYS",
    "STRIP_STATED_KEY",
    "StreamDecoder",
    "Tokenizer",
    "check_kind",
]

NORMALIZER_KEY = "slimrt.tokenizer.normalizer"
"""Metadata key of ours, because GGUF has none: the Unicode normal form that text gets before it is cut."""
STRIP_KEYS = {"left": "slimrt.tokenizer.strip_left", "right": "slimrt.tokenizer.strip_right"}
"""Metadata keys of ours: ids of the tokens before or behind which blanks are dropped."""
STRIP_STATED_KEY = "slimrt.tokenizer.strip_stated"
"""Metadata key of ours: true where the ids under ``STRIP_KEYS`` are all there are, be it none."""
PREFIX_KEY = "slimrt.tokenizer.space_prefix"
"""Metadata key of ours: where the space in front of a text goes, by the names in ``PREFIXES``; the space in front of
every text between special tokens, whatever it begins with, is GGUF's own."""
PREFIXES = ("metaspace always", "metaspace first")
"""The tokenizers library's Metaspace: no space where there is one; ``first``: none behind special tokens."""

_Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


class _Coder(Protocol):
    """What a kind of vocabulary must do; text given to ``encode`` holds no control tokens any more."""

    @property
    def add_bos(self) -> bool: ...
    def encode(self, text: str) -> list[int]: ...
    def token_bytes(self, id: int) -> bytes: ...


class Tokenizer:
    """The tokenizer of one model.

    ``bos_id``, ``eos_id``: None where the model has none. ``add_bos``, ``add_eos``: what the model's metadata wants
    around a text. ``space_prefix``: whether each text gets a space in front of it. ``stop_ids``: every token that ends
    a generation. ``chat_template``: jinja2 source, or None; ``named_chat_templates``: further ones by name.
    """

    def __init__(self, vocab: Vocabulary, coder: _Coder, *, space_prefix: bool, phi3: bool) -> None:
        self._vocab = vocab
        self._coder = coder
        self.space_prefix = space_prefix
        self._pieces: dict[int, bytes] = {}
        self._form = cast("_Form | None", _one_of(vocab, NORMALIZER_KEY, _FORMS))
        self._prefix = _one_of(vocab, PREFIX_KEY, PREFIXES)
        control = [id for id, kind in enumerate(vocab.types) if kind in (CONTROL, UNKNOWN)]
        user = [id for id, kind in enumerate(vocab.types) if kind == USER_DEFINED]
        strip = {side: vocab.id_list(key) for side, key in STRIP_KEYS.items()}
        if phi3 and not vocab.stated(STRIP_STATED_KEY):
            strip["right"] = [id for id in (*control, *user) if vocab.tokens[id] not in _PHI3_KEEPS]
        self._special = SpecialTokens(
            vocab.tokens, control, user, strip_right=strip["right"] or (), strip_left=strip["left"] or ()
        )
        self.vocab_size = len(vocab.tokens)
        self.bos_id, self.eos_id = vocab.bos_id, vocab.eos_id
        self.stop_ids = vocab.stop_ids
        self.chat_template, self.named_chat_templates = vocab.chat_template, vocab.named_chat_templates
        self.add_bos = vocab.flag("add_bos_token", coder.add_bos and self.bos_id is not None)
        self.add_eos = vocab.flag("add_eos_token", False)
        for wanted, id, name in ((self.add_bos, self.bos_id, "bos"), (self.add_eos, self.eos_id, "eos")):
            if wanted and id is None:
                raise ModelFileError(
                    f"{vocab.path}: tokenizer.ggml.add_{name}_token is set and tokenizer.ggml.{name}_token_id is "
                    "missing; the one needs the other; convert the model again"
                )

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer described by ``file``'s metadata.

        Raises ModelFileError where the vocabulary is of an unknown kind, incomplete or inconsistent.
        """
        kind = check_kind(file)
        vocab = Vocabulary(file)
        if kind == "gemma4":
            vocab.pre = kind  # the kind says it, whatever the key
        rule = PRE_TOKENIZERS.get(vocab.pre or "")
        coder: _Coder
        if kind == "llama":
            coder = SentencePieceBPE(vocab)
        else:
            coder = RawBPE(vocab) if rule is not None and rule.raw else ByteLevelBPE(vocab)
        # After Phi-3's markers blanks are dropped, which files from elsewhere do not say. llama.cpp goes by the name.
        name = str(file.metadata.get("general.name", "")).lower()
        by_arch = kind == "llama" and file.metadata.get("general.architecture") == "phi3"
        return cls(
            vocab,
            coder,
            space_prefix=kind == "llama" and vocab.flag("add_space_prefix", True),
            phi3=by_arch or "phi-3" in name or "phi3" in name,
        )

    def encode(
        self, text: str, *, special: bool = False, add_bos: bool | None = None, literal: str | None = None
    ) -> list[int]:
        """The token ids of ``text``.

        ``special``: control tokens spelt in the text become those tokens; else they are text like any other.
        ``literal``: a character that takes this from the control token behind it, and is no part of the text; see
        ``mark_control``. ``add_bos``: None puts around the text what the model's metadata says (BOS in front, EOS
        behind); True puts BOS in front, False nothing.

        Raises TokenizerError for lone surrogates, for a character that the vocabulary cannot express, and for a BOS
        that the model does not have.
        """
        self._check_text(text)
        ids: list[int] = []
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise TokenizerError(
                    f"add_bos=True: {self._vocab.path} has no BOS token; leave add_bos out for this model"
                )
            ids.append(self.bos_id)
        for at, part in enumerate(self._special.cut_out(text, control=special, literal=literal)):
            if isinstance(part, int):
                ids.append(part)
            else:
                if self._form is not None:
                    part = unicodedata.normalize(self._form, part)
                ids += self._coder.encode(" " + part if self._gets_prefix(part, at) else part)
        if add_bos is None and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def _gets_prefix(self, part: str, at: int) -> bool:
        """Whether a space goes in front of the text ``part``, the ``at``-th of the texts and special tokens."""
        if not self.space_prefix or self._prefix is None:
            return self.space_prefix
        return not part.startswith((" ", "\u2581")) and (at == 0 or self._prefix == PREFIXES[0])

    def encode_within(self, text: str) -> list[int]:
        """The ids of ``text`` in the midst of another: no begin token, no space in front, control tokens are text."""
        self._check_text(text)
        ids: list[int] = []
        for part in self._special.cut_out(text, control=False, literal=None):
            ids += [part] if isinstance(part, int) else self._coder.encode(part)
        return ids

    @staticmethod
    def _check_text(text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}; text must "
                "be valid Unicode; decode the input as UTF-8 with errors='replace'"
            ) from None

    def mark_control(self, text: str, mark: str, *, whole: bool = True) -> str:
        """``text`` with the character ``mark`` in front of every control token that is spelt in it.

        ``encode(..., special=True, literal=mark)`` reads them as text, also as a part of a longer text. Not ``whole``:
        what follows in that longer text might complete a control token, so one that is begun at the end is marked too.
        """
        return self._special.marked(text, mark, whole=whole)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ``ids``; bytes that are not valid UTF-8 become U+FFFD. Arguments as for :meth:`decode_bytes`."""
        return self.decode_bytes(ids, special=special).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The bytes of ``ids``.

        ``special``: control tokens are written out; else they are left out, and where ``ids`` begin with BOS the space
        that ``encode`` put in front of the text is taken away (a continuation keeps its own).

        Raises TokenizerError for an id outside the vocabulary.
        """
        stream = _ByteStream(self, special)
        return b"".join([stream.push(id) for id in ids])

    def token_bytes(self, id: int, *, special: bool = False) -> bytes:
        """The bytes of one token, not always whole characters; empty for a control token unless ``special``."""
        piece = self._pieces.get(id)
        if piece is None:
            piece = self._pieces[id] = self._coder.token_bytes(self._check_id(id))
        return piece if special or self._vocab.types[id] not in (CONTROL, UNKNOWN) else b""

    def is_text(self, id: int) -> bool:
        """Whether token ``id`` stands for text: no control, unknown or unused entry."""
        return self._vocab.types[self._check_id(id)] not in (CONTROL, UNKNOWN, UNUSED)

    def token_text(self, id: int) -> str:
        """The vocabulary's own spelling of token ``id``, for display."""
        return self._vocab.tokens[self._check_id(id)]

    def _check_id(self, id: int) -> int:
        try:
            index = operator.index(id)
        except TypeError:
            index = -1
        if not 0 <= index < self.vocab_size:
            raise TokenizerError(
                f"token id {id!r}: this model's vocabulary has ids 0 to {self.vocab_size - 1}; use one of these"
            )
        return index

    def split_control(self, text: str) -> list[str | int]:
        """``text`` as the ids of the control tokens that are spelt in it and the texts between them."""
        split: list[str | int] = []
        for part in self._special.cut_out(text, control=True, literal=None):
            if isinstance(part, int) and not self.is_text(part):
                split.append(part)
                continue
            piece = part if isinstance(part, str) else self.token_text(part)
            if split and isinstance(split[-1], str):
                split[-1] += piece
            else:
                split.append(piece)
        return split

    @property
    def control_ids(self) -> list[int]:
        """The ids of the control tokens, in order."""
        return [id for id, kind in enumerate(self._vocab.types) if kind in (CONTROL, UNKNOWN)]

    def stream_decoder(self, *, special: bool = False, shown: Collection[int] = ()) -> StreamDecoder:
        """A decoder that takes one token at a time and gives out whole characters only. ``shown``: control tokens that
        are written out though others (not ``special``) are left out."""
        return StreamDecoder(self, special=special, shown=shown)


def check_kind(file: GGUFFile) -> str:
    """The kind of ``file``'s vocabulary; raises ModelFileError for one that is not known."""
    kind = file.get("tokenizer.ggml.model", str)
    if kind not in ("llama", "gpt2", "gemma4"):
        raise ModelFileError(
            f"{file.path}: tokenizer.ggml.model is {kind[:80]!r}; known are llama (SentencePiece, byte-pair type), "
            "gpt2 (byte-level BPE) and gemma4 (BPE of characters); use a model with one of these"
        )
    return kind


def _one_of(vocab: Vocabulary, key: str, known: tuple[str, ...]) -> str | None:
    """The metadata text called ``key``; raises ModelFileError for one that is not ``known``."""
    value = vocab.text(key)
    if value is not None and value not in known:
        raise ModelFileError(
            f"{vocab.path}: {key} is {value[:40]!r}; known are {', '.join(known)}; convert the model again"
        )
    return value


class _ByteStream:
    """Bytes token by token, the space behind an unwritten BOS taken away; the one place that knows this rule."""

    def __init__(self, tokenizer: Tokenizer, special: bool, shown: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special, self._shown = special, shown
        self._place = 0

    def push(self, id: int) -> bytes:
        tokenizer, place = self._tokenizer, self._place
        piece = tokenizer.token_bytes(id, special=self._special or id in self._shown)
        if place < 2:
            after_bos = place == 0 and id == tokenizer.bos_id and tokenizer.space_prefix and not self._special
            self._place = 1 if after_bos else 2
            if place == 1:
                return piece.removeprefix(b" ")
        return piece


class StreamDecoder:
    """Text token by token: what :meth:`Tokenizer.decode` gives, as soon as each character is complete."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False, shown: Collection[int] = ()) -> None:
        self._bytes = _ByteStream(tokenizer, special, shown)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that token ``id`` completes, often none. Raises TokenizerError for an id outside."""
        return self._decoder.decode(self._bytes.push(id))

    def flush(self) -> str:
        """What is left: U+FFFD for bytes that were no whole character, else nothing."""
        return self._decoder.decode(b"", final=True)
