"""The blocks of a prompt: their text, their scores, and how many cuts they survived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slimrt.explain.trace import CutTrace
from slimrt.text.tokenizer import Tokenizer

__all__ = ["Block", "block_texts", "prompt_blocks"]

Place = Literal["start", "end", ""]


@dataclass(frozen=True)
class Block:
    """Tokens ``start`` to ``start + tokens`` of the prompt, and how far they came.

    ``survived``: the cuts that let it pass. ``scores``: one for each cut that it was there for. ``always``: whether it
    stays by its place, at the start or the end of the prompt, whatever its score.
    """

    number: int
    start: int
    tokens: int
    text: str
    survived: int
    scores: tuple[float, ...]
    always: Place


def prompt_blocks(
    tokenizer: Tokenizer, ids: Sequence[int], block: int, cuts: Sequence[CutTrace], *, sink: int, local: int
) -> tuple[Block, ...]:
    """``ids`` in blocks of ``block`` tokens; the first ``sink`` and the last ``local`` of them stay by their place."""
    texts = block_texts(tokenizer, ids, block)
    survived = np.zeros(len(texts), np.int64)
    scores: list[list[float]] = [[] for _ in texts]
    for cut in cuts:
        # Cuts score blocks of what is active; whole blocks go, so each is still one block of the prompt.
        for number, score in zip(cut.positions[::block] // block, cut.scores, strict=True):
            scores[number].append(float(score))
        survived[np.unique(cut.kept // block)] += 1
    blocks = []
    for number, text in enumerate(texts):
        start = number * block
        always: Place = "start" if number < sink else "end" if number >= len(texts) - local else ""
        tokens = min(block, len(ids) - start)
        blocks.append(Block(number, start, tokens, text, int(survived[number]), tuple(scores[number]), always))
    return tuple(blocks)


def block_texts(tokenizer: Tokenizer, ids: Sequence[int], block: int) -> list[str]:
    """The text of each run of ``block`` tokens; a character that a border splits belongs to the earlier run."""
    runs = [tokenizer.decode_bytes([id], special=True) for id in ids]
    parts = [b"".join(runs[at : at + block]) for at in range(0, len(ids), block)]
    whole = b"".join(parts)
    texts, begin, border = [], 0, 0
    for part in parts:
        border += len(part)
        # UTF-8 goes on with bytes 10xxxxxx, three at most.
        end = border
        while end < min(len(whole), border + 3) and whole[end] & 0xC0 == 0x80:
            end += 1
        end = max(begin, end)
        texts.append(whole[begin:end].decode(errors="replace"))
        begin = end
    return texts
