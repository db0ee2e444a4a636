"""The blocks of a prompt: their text, their scores, and how many cuts they survived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slimrt.explain.trace import CutTrace
from slimrt.text.tokenizer import Tokenizer

__all__ = ["Block", "block_texts", "prompt_blocks"]

_AROUND = 4  # tokens before the one that wants a block, so that one sees where it stands

Place = Literal["start", "end", ""]


@dataclass(frozen=True)
class Block:
    """Tokens ``start`` to ``start + tokens`` of the prompt, and how far they came.

    ``survived``: the cuts that let it pass. ``scores``: one for each cut that it was there for. ``always``: whether it
    stays by its place, at the start or the end of the prompt, whatever its score. ``wanted``: for each of the scores,
    in words, by which token the block is wanted most, or which block's successor it is; empty where the score does not
    tell.
    """

    number: int
    start: int
    tokens: int
    text: str
    survived: int
    scores: tuple[float, ...]
    always: Place
    wanted: tuple[str, ...] = ()


def prompt_blocks(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    block: int,
    cuts: Sequence[CutTrace],
    *,
    sink: int,
    local: int,
    follow: float = 0.0,
) -> tuple[Block, ...]:
    """``ids`` in blocks of ``block`` tokens; the first ``sink`` and the last ``local`` of them stay by their place.

    ``follow``: as in the plan, how much of a block's score its successor has.
    """
    texts = block_texts(tokenizer, ids, block)
    survived = np.zeros(len(texts), np.int64)
    scores: list[list[float]] = [[] for _ in texts]
    wanted: list[list[str]] = [[] for _ in texts]
    for cut in cuts:
        # Cuts score blocks of what is active; whole blocks go, so each is still one block of the prompt.
        for number, score in zip(cut.positions[::block] // block, cut.scores, strict=True):
            scores[number].append(float(score))
        if cut.by is not None:
            _say_why(tokenizer, ids, cut, block, follow, wanted)
        survived[np.unique(cut.kept // block)] += 1
    blocks = []
    for number, text in enumerate(texts):
        start = number * block
        always: Place = "start" if number < sink else "end" if number >= len(texts) - local else ""
        tokens = min(block, len(ids) - start)
        blocks.append(
            Block(
                number, start, tokens, text, int(survived[number]), tuple(scores[number]), always, tuple(wanted[number])
            )
        )
    return tuple(blocks)


def _say_why(
    tokenizer: Tokenizer, ids: Sequence[int], cut: CutTrace, block: int, follow: float, wanted: list[list[str]]
) -> None:
    """Add to each block of a cut, by its number, what it was wanted for."""
    assert cut.by is not None
    numbers = cut.positions[::block] // block
    for at, number in enumerate(numbers):
        if at and follow * cut.scores[at - 1] > cut.scores[at]:
            wanted[number].append(f"as the successor of block {numbers[at - 1]}")
        elif cut.by[at] < 0:
            wanted[number].append("")
        else:
            place = int(cut.by[at])
            words = tokenizer.decode(ids[max(0, place - _AROUND) : place + 1], special=True)
            wanted[number].append(f"by token {place}, the end of {words!r}")


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
