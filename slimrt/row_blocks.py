"""How many rows of a prompt pass a layer at a time on a CPU, so that what lies beside the hidden states is bounded.

A layer's parts but attention treat each row alone, and a row attends to rows before it only. So a layer may be done for
some rows after the others, with the same bits; only the hidden states of all rows, and their keys and values, must be
there. Which size is right is a matter of memory alone: the weights of a layer are read once more for each block, in
which thousands of rows are multiplied with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from slimrt.config import ModelConfig

__all__ = ["STEP", "Queries", "block_row_floats", "row_blocks", "rows_at_a_time"]

Array = Any  # the backend's array

_BLOCK_BYTES = 256 << 20  # of the rows of a block, about
STEP = 1024  # blocks begin at multiples of it: where tiles of attention begin, so that each is one tile in any case
_FLOAT = 4


def block_row_floats(c: ModelConfig) -> int:
    """Floats of a row of a block while it passes a layer, beside its hidden state: queries and what attention made of
    them, keys and values on their way to the cache, the hidden state before and after a part."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return 2 * q + 2 * kv + 2 * c.d_model


def rows_at_a_time(c: ModelConfig) -> int:
    """The rows of a block: as many as take about 256 MiB, in steps of 1,024."""
    return max(1, _BLOCK_BYTES // (_FLOAT * block_row_floats(c) * STEP)) * STEP


def row_blocks(count: int, size: int) -> list[slice]:
    """``count`` rows in blocks of ``size``, a multiple of 1,024; fewer than 1,024 that are left go with the last."""
    blocks = max(1, (count + size - STEP) // size)
    return [slice(at * size, count if at == blocks - 1 else (at + 1) * size) for at in range(blocks)]


class Queries(NamedTuple):
    """Of the queries of so many ``rows`` those of the first and of the last ones [n, H, Dh]; perhaps all of them."""

    first: Array
    last: Array
    rows: int
