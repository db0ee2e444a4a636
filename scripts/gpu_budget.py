"""Decode under a KV budget on a card: graphs that choose their blocks on the device beside layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from scripts.gpu_checks import SLACK, Array, Checks, Note
from scripts.gpu_measures import clock
from scripts.gpu_sizes import DRY, Sizes
from slimrt.bench import shaped
from slimrt.config import CacheConfig
from slimrt.engine import Engine
from slimrt.ops.cuda.cupy_ops import CupyOps
from slimrt.session import Session


def budget(note: Note, sizes: Sizes) -> None:
    """Whether both ways say the same, whether each slot has the block that it should have, and how fast they are."""
    ops, checks = CupyOps(), Checks(note)
    model = shaped.open_model(ops, sizes.shape, sizes.measured_types[1])
    length = min(sizes.contexts[-1], 3 * sizes.budget)  # of so many blocks both ways compare all
    decoded = 17 if sizes is DRY else 40  # blocks become full
    caches: list[Any] = []
    ids = np.random.default_rng(6).integers(0, model.config.vocab_size, length).tolist()

    def talk(cache: CacheConfig | None, *, graphs: bool) -> Array:
        ops.budget_graphs = graphs
        session = Session(Engine(model, ops, cache, whole_tokens=graphs), length + decoded + 8)
        session.prefill(ids)
        found = []
        for token in ids[:decoded]:
            session.extend([token])
            found.append(session.logits)
        caches[:] = [session.context.cache]
        return np.array(found)

    def same() -> dict[str, Any]:
        # Fused kernels round elsewhere: what that does to the same tokens without a budget is the unit.
        ways = [[talk(cache, graphs=graphs) for graphs in (False, True)] for cache in (None, settings)]
        unit, error = (float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in ways)
        return {"ok": error <= SLACK * unit, "error": error, "allowed": SLACK * unit}

    def resident() -> dict[str, Any]:
        borrowed, wrong, block = caches[0]._borrower, 0, settings.block  # of the last talk
        assert borrowed is not None, "decode went layer by layer"
        slots, tails = ops.to_host(borrowed.tables.slots), borrowed.tails
        for layer, lent in enumerate(borrowed.layers):
            held = ops.to_host(lent.store)
            for slot, number in enumerate(slots[layer].tolist()):
                if number < tails[layer]:
                    rows = held[:, :, slot * block : (slot + 1) * block]
                    wrong += not np.array_equal(rows.view(np.uint16), lent.homes[number].view(np.uint16))
        swaps = sum(taken.swaps for taken in borrowed.give_back())
        return {"ok": not wrong and swaps > 0, "wrong": wrong, "swaps": swaps}

    settings = CacheConfig(length + decoded + 16, sizes.budget, local_blocks=2)
    checks.run(f"graphs against layer by layer behind {length} tokens", same)
    checks.run("each slot has its block", resident)
    rows: list[dict[str, Any]] = []
    context, tokens = sizes.contexts[-1], sizes.decode_tokens
    for graphs in (False, True):
        ops.budget_graphs = graphs
        engine = Engine(model, ops, CacheConfig(context + 2 * tokens + 16, sizes.budget))
        row = shaped.measure(engine, context, "off", repeats=sizes.times(2 * context), decode_tokens=tokens)
        rows.append({"graphs": graphs, **vars(row), **clock()})
        note(rows=rows)
    checks.finish()
