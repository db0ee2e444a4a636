"""Prefill and decode: the layer loop, so that the whole method is visible in one place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import numpy as np

from slimrt.attention import Attention
from slimrt.config import CacheConfig
from slimrt.context import Context, Kept, Progress, Trace
from slimrt.errors import ComputeError, SettingError
from slimrt.kv.boundary import BoundaryStates
from slimrt.kv.cache import KVCache
from slimrt.kv.host_blocks import reserve_host_memory
from slimrt.kv.offload import OffloadedKVCache
from slimrt.kv.windowed import WindowedKVCache
from slimrt.layer_pass import LayerPass
from slimrt.models import Llama
from slimrt.ops.protocol import Cache, Decoder, Ops, Part
from slimrt.parts import Parts
from slimrt.prune.schedule import DENSE, Schedule, Windows
from slimrt.prune.select import select_rows

P = ParamSpec("P")
R = TypeVar("R")


def _computing(method: Callable[Concatenate[Engine, P], R]) -> Callable[Concatenate[Engine, P], R]:
    """Run ``method`` in the backend's own setting of threads and warnings."""

    @functools.wraps(method)
    def run(engine: Engine, *args: P.args, **kwargs: P.kwargs) -> R:
        with engine.ops.computing():
            return method(engine, *args, **kwargs)

    return run


class _Closed:
    """In the place of a model whose memory was given back."""

    adapters = ""  # its sessions may still be let go

    def __getattr__(self, name: str) -> NoReturn:
        raise SettingError("this model was closed and its memory given back; load it again")


class Engine:
    """One model on one backend. It holds no conversation: the context is an argument."""

    def __init__(self, model: Llama, ops: Ops, cache: CacheConfig | None = None, *, whole_tokens: bool = True) -> None:
        """``whole_tokens`` False: decode goes layer by layer also where the backend has a way of its own (to debug)."""
        self.model, self.ops, self.config, self.cache_config = model, ops, model.config, cache
        self.parts = Parts(ops)
        self.attention = Attention(model, ops, self.parts)
        self._pass = LayerPass(model, ops, self.attention, self.parts)
        self._whole_tokens = whole_tokens
        self._decoders: dict[str, Decoder | None] = {}  # by the adapters that are applied
        # Where sessions find and keep what was read of long prompts (a slimrt.library.store.Library), if anywhere.
        self.library: Any = None
        # How generations guess next tokens that do not say so themselves: "auto", "lookup", a
        # slimrt.drafting.model.DraftModel, or None.
        self.draft: Any = "auto"
        if cache is not None and cache.offloads:
            reserve_host_memory(ops, cache, model.config)

    def close(self) -> None:
        """Let go of the weights; whoever still has the engine gets a SettingError."""
        self.model = self.attention = self._pass = _Closed()  # type: ignore[assignment]
        self._decoders.clear()

    @property
    def turn(self) -> Callable[[], None] | None:
        """Where several share the engine: called between the parts of a layer while a prompt is read, so that others
        can read or write a little in contexts of their own. What it raises ends the reading."""
        return self.parts.turn

    @turn.setter
    def turn(self, turn: Callable[[], None] | None) -> None:
        self.parts.turn = turn

    @property
    def budgeted(self) -> bool:
        """Whether decode reads a budget of rows only, which the cache chooses for each token."""
        return self.cache_config is not None and self.cache_config.budget is not None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves, over all layers, as this backend keeps them."""
        c = self.config
        return c.n_layers * 2 * c.n_kv_heads * c.head_dim * np.dtype(self.ops.kv_type).itemsize

    def new_context(self, boundary_layer: int | None = None, windows: Windows | None = None) -> Context:
        """An empty context; ``boundary_layer`` is the layer of the first cut if prompts are to be pruned in it."""
        boundary = None if boundary_layer is None else BoundaryStates(boundary_layer, self.config.d_model)
        return Context(self._new_cache(), boundary, windows or Windows())

    def _new_cache(self) -> Cache:
        if self.cache_config is None or not self.budgeted or not self.config.sees_all():
            return KVCache(self.config, self.ops)  # all rows, or nothing to choose anywhere
        if self.config.windows:
            return WindowedKVCache(self.config, self.ops, self.cache_config)
        return OffloadedKVCache(self.config, self.ops, self.cache_config)

    @_computing
    def prefill(
        self,
        context: Context,
        ids: Sequence[int] | np.ndarray,
        schedule: Schedule = DENSE,
        *,
        wanted: int = 1,
        progress: Progress | None = None,
        trace: Trace | None = None,
    ) -> tuple[np.ndarray, tuple[Kept, ...]]:
        """Read the end ``ids`` [T] of a prompt whose beginning ``context`` holds, one layer at a time.

        Returns the hidden states [wanted, D] of the last ``wanted`` tokens, for ``logits`` (the last layer computes
        those rows only), and what each cut kept.

        ``schedule`` is that of the whole prompt; its first cut does not come before the context's boundary layer. With
        cuts, up to the boundary only ``ids`` are computed; there blocks are chosen among all tokens by the last
        queries, and the stages behind it are computed again over the choice. Keys and values of a layer are those of
        the tokens that were active there. Without cuts ``ids`` pass all layers; under a ``whole`` schedule those behind
        the boundary read what came before ``ids`` as well, and the boundary moves on at the layers in its ``moves``.
        """
        context.windows = schedule.windows
        return self._through_layers(context, ids, schedule, wanted=wanted, progress=progress, trace=trace)

    @_computing
    def extend(
        self,
        context: Context,
        ids: Sequence[int] | np.ndarray,
        *,
        wanted: int = 1,
        exact: bool = True,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Read tokens ``ids`` [T] that follow the prompt: they pass all layers and look at all that is there.

        Returns the hidden states [wanted, D] of the last ``wanted`` tokens. ``exact`` False lets a single token read
        the rows within the cache's budget only.
        """
        return self._through_layers(context, ids, DENSE, wanted=wanted, exact=exact, progress=progress)[0]

    def _through_layers(
        self,
        context: Context,
        ids: Sequence[int] | np.ndarray,
        schedule: Schedule,
        *,
        wanted: int,
        exact: bool = True,
        progress: Progress | None = None,
        trace: Trace | None = None,
    ) -> tuple[np.ndarray, tuple[Kept, ...]]:
        model, ops, cache = self.model, self.ops, context.cache
        positions = np.arange(context.length, context.length + len(ids))
        cut_at = {cut.layer: cut for cut in schedule.cuts}
        kept = []
        x = model.embed(np.asarray(ids))
        turns = model.rope(positions)
        if trace:
            trace.begin()
        for number, packed in enumerate(model.layers):
            layer = model.unpacked(packed) if len(x) >= ops.unpack_rows else packed
            first = len(x) - wanted if number == len(model.layers) - 1 else 0
            look = None if trace is None else functools.partial(trace.attention, number)
            boundary = context.boundary if context.boundary and context.boundary.layer == number else None
            if number in cut_at or (boundary and schedule.anew):
                q, held = self._pass.keyed(cache, schedule, layer, number, x, positions, turns, look=look)
                if boundary:
                    cache.clear(number + 1)
                    boundary.append(x, q.first, attended=False)
                    positions = np.arange(boundary.length)
                rows = np.arange(len(positions))
                if number in cut_at:
                    scores, by = self.attention.scores(context, schedule, number, q, held.keys, positions)
                    rows, why = select_rows(schedule, cut_at[number], scores, len(positions))
                    kept.append(Kept(positions[rows], why))
                    if trace:
                        trace.cut(number, positions, scores, rows, by)
                del q
                # What leaves need not attend; what a question before this one chose has done so.
                attend = functools.partial(self._pass.attended_some, schedule, layer, number, held=held)
                if boundary:
                    del x
                    late = boundary.waiting(rows)
                    if len(late):
                        at = positions[late]
                        boundary.put(late, attend(boundary.before(ops, late), late, at, model.rope(at)))
                    x = boundary.behind(ops, rows)
                positions = positions[rows]
                turns = model.rope(positions)
                if not boundary:
                    x = attend(self._pass.kept(x, rows), rows, positions, turns)
                del held, attend
            else:
                x, q, _ = self._pass.attended(
                    cache, schedule, layer, number, x, positions, turns, first=first, exact=exact, look=look
                )
                if number in schedule.moves:
                    boundary = context.boundary = BoundaryStates(number, self.config.d_model)
                if boundary:
                    boundary.append(x, q.first)
                del q
            cache.attended(number)
            x = self._pass.fed(layer, x)
            del layer  # a scratch copy of its weights goes before the next layer's is made
            if trace:
                trace.layer(number)
            if progress:
                progress(number + 1, len(model.layers))
        context.length += len(ids)
        return x, tuple(kept)

    def decode_one_token(self, context: Context, token: int) -> np.ndarray:
        """Read one token, which looks at the rows within the cache's budget, at all where there is none.

        Returns the next-token logits [V] (a host array). Raises as ``logits`` does.
        """
        return self.decode(context, [token])[0]

    def decode(self, context: Context, tokens: Sequence[int], *, alike: bool = True) -> np.ndarray:
        """Read ``tokens`` as ``decode_one_token`` reads one after the other, bit for bit, ``together`` of them at a
        time. ``alike`` False: where that is one, all in a pass nevertheless, which rounds as one over a prompt does.

        Returns the logits [T, V] after each of them. Raises as ``logits`` does.
        """
        parts, some = [], self.together
        if some == 1 and not alike and len(tokens) > 1:
            return self.logits(self.extend(context, tokens, wanted=len(tokens)))
        for at in range(0, len(tokens), some):
            parts.append(self._decoded(context, tokens[at : at + some]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def together(self) -> int:
        """How many tokens ``decode`` reads in one pass, at most: more than one where that is quicker."""
        return 1 if self._decoder is None else self._decoder.most

    def _decoded(self, context: Context, tokens: Sequence[int]) -> np.ndarray:
        if self._decoder is None:
            return self.logits(self.extend(context, tokens, exact=False))
        return self._stepped(self._decoder, [(context, tokens)])

    def decode_together(self, reads: Sequence[tuple[Context, Sequence[int]]]) -> list[np.ndarray]:
        """Read tokens behind several contexts in one pass over the weights, each as ``decode`` does, bit for bit. All
        of them together are not more than ``together`` says of each.

        Returns the logits [T, V] of each. Raises as ``logits`` does, then for all of them.
        """
        if self._decoder is None or sum(len(tokens) for _, tokens in reads) > self._decoder.most:
            raise ValueError("so many tokens pass one after the other on this backend; see Engine.together")
        logits = self._stepped(self._decoder, reads)
        return np.split(logits, np.cumsum([len(tokens) for _, tokens in reads])[:-1])

    def _stepped(self, decoder: Decoder, reads: Sequence[tuple[Context, Sequence[int]]]) -> np.ndarray:
        parts = []
        for context, tokens in reads:
            middle = None if context.boundary is None else context.boundary.layer
            parts.append(Part(context.cache, tokens, context.length, middle))
        logits, states = decoder.step(parts)
        for (context, tokens), hidden in zip(reads, states, strict=True):
            if context.boundary is not None and hidden is not None:
                context.boundary.append(hidden)
            context.length += len(tokens)
        return _finite(self.model.finished(logits))

    @property
    def adapters(self) -> str:
        """Which adapters are applied; empty: none. What was read under others is not to be read on from."""
        return self.model.adapters

    @property
    def _decoder(self) -> Decoder | None:
        """The backend's own way to read a token, if it has one. Made when the first token is decoded, and for adapters
        when the first is after they were set."""
        if not self._whole_tokens:
            return None
        adapters = self.model.adapters
        if adapters not in self._decoders:
            for other in [name for name in self._decoders if name]:
                del self._decoders[other]  # that without adapters stays
            self._decoders[adapters] = self.ops.decoder(self.model, budget=self.budgeted)
        return self._decoders[adapters]

    @_computing
    def logits(self, x: np.ndarray) -> np.ndarray:
        """Hidden states [T, D] -> logits [T, V] float32 on the host; raises ComputeError if they are not finite."""
        logits = np.empty((len(x), self.config.vocab_size), np.float32)

        def head(rows: slice) -> None:
            logits[rows] = self.ops.to_host(self.model.logits(x[rows]))

        self.ops.rows(head, len(x))
        return _finite(self.model.finished(logits))

    @_computing
    def last_states(self, x: np.ndarray) -> np.ndarray:
        """Hidden states [T, D], as ``prefill`` returns them -> behind the output norm [T, D] float32 on the host."""
        return _finite(self.ops.floats(self.model.normed(x)))


def _finite(logits: np.ndarray) -> np.ndarray:
    """``logits`` themselves; raises ComputeError if one is NaN or infinite."""
    if not np.isfinite(logits).all():
        raise ComputeError(
            "the model's logits are not finite: its weights hold NaN or infinity (fetch or convert it again), or its "
            "keys are too large for float16 (use device 'numpy')"
        )
    return logits
