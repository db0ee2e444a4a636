"""How much each column of a model's matrices counts: mean squares of what comes in while the model reads a text.

What llama.cpp calls an importance matrix. An error in a weight changes a product by the weight's input, so the squared
error of products is that of weights, each counted by the mean square of its input. The NumPy backend reads the text, in
pieces, each from its beginning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from slimrt.engine import Engine
from slimrt.errors import ComputeError, SettingError
from slimrt.memory.plan import plan
from slimrt.models import build, read_config
from slimrt.ops.numpy.numpy_ops import NumpyOps, Weight
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile

__all__ = ["Importance", "measure_importance"]

PIECE = 512  # tokens read at a time, as llama.cpp's tool does
MOST_PIECES = 64  # more change the third digit of means at most
_FEWEST_TOKENS = 32

Array = np.ndarray


@dataclass(frozen=True)
class Importance:
    """``columns``: by tensor name, float32 [columns]. ``pieces``: how many pieces of text were read."""

    columns: Mapping[str, Array]
    pieces: int


class _CountingOps(NumpyOps):
    """NumPy's operations, that keep count of what goes into every product of a layer."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__(packed=packed)
        self.squares: dict[str, Array] = {}
        self.rows_seen: dict[str, int] = {}
        self._lock = threading.Lock()  # slices of rows run at once

    def linear(self, x: Array, weight: Weight, bias: Array | None = None, out: Array | None = None) -> Array:
        squares = np.einsum("tc,tc->c", x, x, dtype=np.float64)
        with self._lock:
            for part in weight.parts:
                if part.name in self.squares:
                    self.squares[part.name] += squares
                    self.rows_seen[part.name] += len(x)
                else:
                    self.squares[part.name], self.rows_seen[part.name] = squares.copy(), len(x)
        return super().linear(x, weight, bias, out)


def measure_importance(file: GGUFFile, text: str, progress: Callable[[int, int], None] | None = None) -> Importance:
    """What the layers' matrices of the model ``file`` take in while it reads ``text``, or up to 64 pieces of 512 tokens
    spread over it. ``progress`` is called with (pieces read, pieces).

    Raises ModelFileError for a file that does not run, SettingError for a text of too few tokens and for a model that
    does not fit into memory, ComputeError where the model computes NaN or infinity.
    """
    config = read_config(file)
    tokenizer = Tokenizer.from_gguf(file)
    length = min(PIECE, config.ctx_train)
    memory = plan(config, file, length)
    if not memory.fits():
        raise SettingError(
            f"an importance matrix needs the model in memory, {memory.total / 2**30:.1f} GiB; free some, or quantise "
            "without one"
        )
    ids = tokenizer.encode(text, add_bos=False)
    if len(ids) < _FEWEST_TOKENS:
        raise SettingError(
            f"the text for an importance matrix has {len(ids)} tokens; at least {_FEWEST_TOKENS} are needed, better "
            "10,000 and more; take a longer text"
        )
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    step = length - len(begin)
    starts = range(0, max(1, len(ids) - step + 1), step)
    if len(starts) > MOST_PIECES:
        starts_kept = [starts[at * len(starts) // MOST_PIECES] for at in range(MOST_PIECES)]
    else:
        starts_kept = list(starts)
    ops = _CountingOps(packed=memory.packed)
    try:
        engine = Engine(build(config, file, ops), ops)
        for done, start in enumerate(starts_kept):
            if progress is not None:
                progress(done, len(starts_kept))
            piece = [*begin, *ids[start : start + step]]
            # All rows are wanted: else the last layer computes one.
            engine.prefill(engine.new_context(), piece, wanted=len(piece))
        if progress is not None:
            progress(len(starts_kept), len(starts_kept))
    finally:
        ops.close()
    columns = {name: (squares / ops.rows_seen[name]).astype(np.float32) for name, squares in ops.squares.items()}
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise ComputeError(
                f"{file.path}: what '{name}' is given is not finite; the file is damaged; fetch it again"
            )
    return Importance(columns, len(starts_kept))
