"""What a serialised SentencePiece model says that the library's Python interface does not tell.

Fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. The library has accepted the
bytes before, so they are well formed; a varint cut off at the end is an error all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slimrt.errors import TokenizerError

__all__ = ["SentencePieceModel", "read_model"]

_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "unigram", _BPE: "byte-pair", 3: "word", 4: "character"}
_USER_DEFINED = 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePieceModel:
    """``user_defined``: ids of entries that are found in text before merging. ``add_space_prefix``,
    ``remove_extra_spaces``: what the normaliser does to spaces."""

    user_defined: frozenset[int]
    add_space_prefix: bool
    remove_extra_spaces: bool


def read_model(raw: bytes, path: Path) -> SentencePieceModel:
    """Raises TokenizerError for a model that is not of the byte-pair type, and for one whose normaliser changes more
    than spaces, which GGUF has no place for."""
    user, count, normalizer = [], 0, b""
    trainer: dict[int, int | bytes] = {}
    try:
        for field, value in _fields(raw):
            if field == 1 and isinstance(value, bytes):
                if dict(_fields(value)).get(3) == _USER_DEFINED:
                    user.append(count)
                count += 1
            elif field == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif field == 3 and isinstance(value, bytes):
                normalizer = value
        rules = dict(_fields(normalizer))
    except (IndexError, ValueError):
        raise TokenizerError(f"{path}: not a whole SentencePiece model; fetch the file again") from None
    kind = trainer.get(3, _UNIGRAM)
    if kind != _BPE:
        raise TokenizerError(
            f"{path}: a SentencePiece model of the {_KINDS.get(int(kind), kind)} type; the byte-pair type can be "
            "converted; choose another model"
        )
    if rules.get(2):
        name = rules.get(1, b"")
        shown = name.decode(errors="replace")[:40] if isinstance(name, bytes) else str(name)
        raise TokenizerError(
            f"{path}: text is normalised by {shown!r} before it is cut, which GGUF files of this kind "
            "cannot say; models with the normaliser identity can be converted"
        )
    if not rules.get(5, 1) or trainer.get(24):
        raise TokenizerError(
            f"{path}: spaces stay as they are, or stand behind words; entries with a low line for a space in front can "
            "be converted; choose another model"
        )
    return SentencePieceModel(frozenset(user), bool(rules.get(3, 1)), bool(rules.get(4, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(wire)
        if at + size > len(data):
            raise IndexError(size)
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
