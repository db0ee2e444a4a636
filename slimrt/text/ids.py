"""Token ids that somebody else made, checked."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from slimrt.config import is_whole
from slimrt.errors import SettingError

__all__ = ["checked_ids"]


def checked_ids(prompt: Any, vocab_size: int) -> list[int]:
    """A prompt that is no text, as a list of ids. Raises SettingError for what is no list of ids < ``vocab_size``."""
    if isinstance(prompt, (bytes, bytearray, memoryview, Mapping, Set)) or not hasattr(prompt, "__iter__"):
        raise SettingError(
            f"prompt of type {type(prompt).__name__}: must be a text or a list of token ids; decode bytes first"
        )
    ids = list(prompt)
    for at, token in enumerate(ids):
        if type(token) is not int:
            if not is_whole(token):
                raise SettingError(
                    f"prompt: item {at} is {str(token)[:40]!r}; a prompt is one text, or a list of token ids"
                )
            ids[at] = token = int(token)
        if not 0 <= token < vocab_size:
            raise SettingError(f"prompt: item {at} is the token id {token}; this model has ids 0 to {vocab_size - 1}")
    return ids
