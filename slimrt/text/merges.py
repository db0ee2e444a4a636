"""When does merging by token rank, as ``tiktoken`` does it, give what a merges list says?

A merges list (Sennrich et al., arXiv 1508.07909) applies the pair that stands first in it, leftmost first. ``tiktoken``
knows no pairs: it joins any two neighbours whose bytes are a ranked token, lowest rank first, leftmost first. The two
differ where the list lacks a split of a token that tiktoken takes, or where a token's rank is not its pair's place.

*One split.* Merging only ever removes boundaries between tokens, so the events inside a span whose ends are still
boundaries are those of that span alone. Hence two neighbours that together spell token t can only be *the* two into
which t's own bytes are merged just before the end: a token has one reachable split, or none, and then it never arises.

*Exactness, first way* (lists made by training: one split per token). Give tiktoken exactly the tokens that have a
reachable split in the list, ranked by the place of that split: every pair that it ever sees is a pair of the list,
with the list's order. If the parts of each reachable pair come earlier in the list than the pair, events occur in the
order of the list. Then (x, y) is reachable if no pair across its boundary is ever first: walk back in time down the
right edge of x and the left edge of y, undoing the later of the two merges at the boundary, and check that the two
tokens that face each other there have no pair that would have come before the merge just undone. (The walk is that of
the ``bpe`` crate of github/rust-gems.) Edges need only shorter tokens, so all pairs of one length are walked at once.

*Exactness, second way* (lists made from tiktoken's ranks, LLaMA-3's: all splits of every token, token by token). Every
pair that tiktoken can see is in the list, tokens stand in the order of their ranks, and the order among the splits of
one token cannot matter because one of them is reachable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["MergesList", "rank_order"]

_UNMADE, _BYTE = -2, -1
_FILTER_BITS = np.uint64(22)
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class MergesList:
    """Merges as token ids: ``left``, ``right``, ``result``, int64, one per merge in the order of the list.

    ``tokens``: the vocabulary, one character a byte. ``byte_ids``: the tokens of one byte, where merging starts.
    """

    left: np.ndarray
    right: np.ndarray
    result: np.ndarray
    tokens: list[str]
    byte_ids: np.ndarray


def rank_order(merges: MergesList, *, whole_pieces: bool) -> np.ndarray | None:
    """The tokens that merging makes, in the order of ranks with which tiktoken does exactly what the list says.

    ``whole_pieces``: a piece of text that is a token becomes that token without merging, as tiktoken always does and
    lists do only in part; the first way yields tokens for which that makes no difference, the second does not.

    Returns int64 ids, or None where neither way proves such an order.
    """
    if not len(merges.left):
        return np.zeros(0, np.int64)
    if whole_pieces:
        order = _order_of_all_splits(merges)
        if order is not None:
            return order
    return _order_of_reachable_splits(merges)


class _Lookup:
    """Finds many 64-bit keys in a sorted set at once; a bit table answers most of the misses."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys
        self._maybe = np.zeros(1 << int(_FILTER_BITS), np.bool_)
        self._maybe[self._hash(keys)] = True

    @staticmethod
    def _hash(keys: np.ndarray) -> np.ndarray:
        return (keys.astype(np.uint64) * _MIX) >> (np.uint64(64) - _FILTER_BITS)

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of ``wanted`` are there, and where: two index arrays of equal length."""
        hit = np.flatnonzero(self._maybe[self._hash(wanted)])
        at = np.minimum(np.searchsorted(self.keys, wanted[hit]), len(self.keys) - 1)
        there = self.keys[at] == wanted[hit]
        return hit[there], at[there]


def _order_of_all_splits(merges: MergesList) -> np.ndarray | None:
    starts = np.flatnonzero(np.diff(merges.result, prepend=-1))
    order = merges.result[starts]
    if len(starts) == len(merges.result) or len(np.unique(order)) < len(order):
        return None  # one split each, or the splits of a token do not stand together
    texts = [merges.tokens[id] for id in order.tolist()]
    singles = {merges.tokens[id] for id in merges.byte_ids.tolist()}
    if not set("".join(texts)) <= singles:
        return None  # an entry that is not written in bytes
    ranked = np.zeros(len(merges.tokens), np.bool_)
    ranked[order] = ranked[merges.byte_ids] = True
    arises = ranked[merges.left] & ranked[merges.right]
    pairs = np.unique(merges.left[arises] * len(ranked) + merges.right[arises])
    # Listed splits are splits, so equal numbers mean equal sets; a hash collision can only make the numbers differ.
    return order if len(pairs) == _count_splits([*singles, *texts]) else None


def _count_splits(texts: list[str]) -> int:
    """In how many ways ``texts`` fall into two of ``texts``, counted by hashes of every head and tail."""
    chars = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4").astype(np.uint64) + np.uint64(1)
    length = np.array([len(text) for text in texts], np.int64)
    end = np.cumsum(length)
    start = end - length
    # Polynomial hash modulo 2**64: of chars[a:b] it is (sums[b] - sums[a]) / base**a; an odd base has an inverse.
    base = 0x5851F42D4C957F2D
    powers, inverses = (
        np.concatenate([[np.uint64(1)], np.cumprod(np.full(len(chars), factor, np.uint64))])
        for factor in (base, pow(base, -1, 1 << 64))
    )
    sums = np.concatenate([[np.uint64(0)], np.cumsum(chars * powers[:-1])])
    known = _Lookup(np.unique((sums[end] - sums[start]) * inverses[start]))
    cuts = length - 1  # per text, one before each character but the first
    owner = np.repeat(np.arange(len(length)), cuts)
    cut = np.arange(len(owner)) - np.repeat(np.cumsum(cuts) - cuts, cuts) + start[owner] + 1
    heads, _ = known.find((sums[cut] - sums[start[owner]]) * inverses[start[owner]])
    owner, cut = owner[heads], cut[heads]
    tails, _ = known.find((sums[end[owner]] - sums[cut]) * inverses[cut])
    return len(tails)


def _order_of_reachable_splits(merges: MergesList) -> np.ndarray | None:
    left, right, result = merges.left, merges.right, merges.result
    n_tokens = len(merges.tokens)
    # unique() keeps the first place of a pair that is listed twice, as every encoder by list does.
    keys, places = np.unique(left * n_tokens + right, return_index=True)
    walk = _Walk(n_tokens, merges.byte_ids, _Lookup(keys), places)
    length = np.fromiter(map(len, merges.tokens), np.int64, n_tokens)[result]
    listed = np.sort(places)
    listed = listed[np.argsort(length[listed], kind="stable")]
    for level in np.split(listed, np.flatnonzero(np.diff(length[listed])) + 1):
        level = level[walk.reachable(left[level], right[level])]
        x, y, token = left[level], right[level], result[level]
        if np.any(np.maximum(walk.made[x], walk.made[y]) >= level):
            return None  # a part is made after the pair: events do not occur in the order of the list
        walk.made[token], walk.first_part[token], walk.last_part[token] = level, x, y
    merged = np.flatnonzero(walk.made >= 0)
    return merged[np.argsort(walk.made[merged])]


class _Walk:
    """Back in time along the boundary of many pairs at once.

    ``made``: the place of each token's reachable split, -1 for single bytes, -2 for what is not made (yet).
    """

    def __init__(self, n_tokens: int, byte_ids: np.ndarray, pairs: _Lookup, places: np.ndarray) -> None:
        self.made = np.full(n_tokens, _UNMADE, np.int64)
        self.made[byte_ids] = _BYTE
        self.first_part, self.last_part = np.zeros(n_tokens, np.int64), np.zeros(n_tokens, np.int64)
        self._pairs, self._places = pairs, places

    def reachable(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """For each i: are both made, and does the boundary between x[i] and y[i] last until they are? bool [n]."""
        made = self.made
        holds = (made[x] > _UNMADE) & (made[y] > _UNMADE)
        at = np.flatnonzero(holds)
        u, v = x[at], y[at]
        while len(at):
            # Of two equal merges the left one happened first, so the right one is undone first; and a pair across the
            # boundary with the place of v's own merge stands to the left of it and would have won.
            undo_v = made[v] >= made[u]
            going = ~(undo_v & (made[v] == _BYTE))  # else both are single bytes: nothing is left to undo
            limit = np.where(undo_v, made[v] + 1, made[u])
            u, v = np.where(undo_v, u, self.last_part[u]), np.where(undo_v, self.first_part[v], v)
            found, where = self._pairs.find(u * len(made) + v)
            crossed = found[going[found] & (self._places[where] < limit[found])]
            holds[at[crossed]] = going[crossed] = False
            at, u, v = at[going], u[going], v[going]
        return holds
