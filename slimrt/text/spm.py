"""SentencePiece vocabularies of the byte-pair type (LLaMA 1/2, Mistral), by the ``sentencepiece`` library.

The library wants a serialised ``ModelProto``; GGUF keeps what was in it as arrays. It is written here field by field
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto), which takes four field types and
spares the protobuf package as a dependency. The normaliser is the identity and no space is put in front or taken away:
as in llama.cpp, text is taken as it is, and the space in front is the caller's affair. Only where the file says that
extra spaces go (``remove_extra_whitespaces``, which llama.cpp passes over here) the library sees to both.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import sentencepiece

from slimrt.errors import ModelFileError, TokenizerError
from slimrt.text.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary

__all__ = ["SentencePieceBPE"]

_SPACE = "\u2581"  # stands for a space in the vocabulary
# The library refuses entries with a NUL, which InternLM2's vocabulary has; this noncharacter, which no text has a use
# for, takes its place on both sides.
_NUL = "\ufdd0"


class SentencePieceBPE:
    """Text to ids and ids to bytes for ``tokenizer.ggml.model`` 'llama'.

    Raises ModelFileError for scores or byte entries that make no SentencePiece model.
    """

    add_bos = True

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        scores = vocab.numbers("tokenizer.ggml.scores", kinds="iuf")
        if scores is None or np.isnan(scores).any():
            fault = "missing" if scores is None else "NaN in places"
            raise ModelFileError(
                f"{vocab.path}: metadata key 'tokenizer.ggml.scores' is {fault}; a SentencePiece vocabulary has a "
                "score for every entry; convert the model again"
            )
        self._has_nul = any("\0" in text for text in vocab.tokens)
        self._byte_fallback = len(set(vocab.byte_values.values())) == 256
        proto = b"".join(_model_proto(vocab, scores.astype(np.float32).tolist(), byte_fallback=self._byte_fallback))
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(proto)
        except (RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ModelFileError(
                f"{vocab.path}: the vocabulary makes no SentencePiece model ({reason[:200]}); convert the model again"
            ) from None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, which holds no control tokens.

        Raises TokenizerError where the vocabulary lacks a character and has no entry for the unknown.
        """
        ids: list[int] = self._processor.encode(text.replace("\0", _NUL) if self._has_nul else text)
        if not self._byte_fallback and ids and max(ids) >= len(self._vocab.tokens):
            raise TokenizerError(
                f"{text[:20]!r} holds a character that the vocabulary of {self._vocab.path} lacks, and it has "
                "neither byte entries nor one for the unknown; remove the character or use another model"
            )
        return ids

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token ``id`` stands for."""
        plain = self._vocab.plain_bytes(id)
        return self._vocab.tokens[id].replace(_SPACE, " ").encode() if plain is None else plain


def _model_proto(vocab: Vocabulary, scores: list[float], byte_fallback: bool) -> Iterator[bytes]:
    """The fields of a ModelProto, to be joined. An unknown entry is added behind the vocabulary where it has none."""
    unknown = vocab.special_id("unknown")
    if unknown is None or vocab.types[unknown] in (NORMAL, USER_DEFINED):
        unknown = next((id for id, kind in enumerate(vocab.types) if kind == UNKNOWN), None)
    for id, (text, score, kind) in enumerate(zip(vocab.tokens, scores, vocab.types, strict=True)):
        # Exactly one unknown entry is allowed. Control entries take no part in merging; all others do, user-defined
        # ones too: text that spells one was cut out before, yet merging may pass through it, as in llama.cpp.
        if id == unknown:
            type_ = UNKNOWN
        elif kind in (CONTROL, UNKNOWN):
            type_ = CONTROL
        else:
            type_ = kind if kind == BYTE and byte_fallback else NORMAL
        yield _piece(text.replace("\0", _NUL), score, type_)
    if unknown is None:
        yield _piece("<slimrt-unknown>", 0.0, UNKNOWN)
    unknown_id = len(vocab.tokens) if unknown is None else unknown
    trainer = (
        _number(3, 2)  # model_type: BPE
        + _number(35, int(byte_fallback))
        + _number(40, unknown_id)
        + _text(45, "<slimrt-unknown>" if unknown is None else vocab.tokens[unknown])
    )
    trim = vocab.flag("remove_extra_whitespaces", False)
    # Trimmed, the caller's space in front goes too.
    prefix = trim and vocab.flag("add_space_prefix", True)
    normalizer = _text(1, "identity") + _number(3, int(prefix)) + _number(4, int(trim)) + _number(5, 1)
    yield _block(2, trainer)
    yield _block(3, normalizer)


def _piece(text: str, score: float, type_: int) -> bytes:
    return _block(1, _text(1, text) + b"\x15" + struct.pack("<f", score) + _number(3, type_))  # 0x15: field 2, float


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _block(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _block(field, text.encode())
