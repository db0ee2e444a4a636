"""Speculative decoding under llama_cpp's names."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimrt.drafting.lookup import Lookup
from slimrt.errors import SettingError

__all__ = ["LlamaPromptLookupDecoding", "draft_of"]


class LlamaPromptLookupDecoding:
    """For ``Llama(draft_model=...)``: guess what stood behind the same words before.

    How long a match must be and how many tokens are guessed is decided while the text is written, by what pays;
    ``max_ngram_size`` and ``num_pred_tokens`` matter only where the object is called by itself.
    """

    def __init__(self, max_ngram_size: int = 2, num_pred_tokens: int = 10) -> None:
        self.max_ngram_size, self.num_pred_tokens = max_ngram_size, num_pred_tokens

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> np.ndarray:
        """ids so far [N] -> the next ones, int32, at most ``num_pred_tokens``: none where nothing stood before."""
        found = Lookup(input_ids).match()
        return np.empty(0, np.int32) if found is None else found[0][: self.num_pred_tokens].astype(np.int32)


def draft_of(draft_model: object) -> str:
    """``draft_model`` of ``Llama`` as ``slimrt.load`` takes it. Raises SettingError for models of the user's own."""
    if draft_model is None:
        return "auto"
    if isinstance(draft_model, LlamaPromptLookupDecoding):
        return "lookup"
    raise SettingError(
        f"draft_model of type {type(draft_model).__name__}: must be LlamaPromptLookupDecoding or None; "
        "a second model file guesses in slimrt.load(draft=...)"
    )
