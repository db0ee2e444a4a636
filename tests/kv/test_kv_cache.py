"""The KV cache under a budget: every schedule against a plain dictionary, every wait against its absence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrt.config import CacheConfig
from slimrt.errors import ComputeError
from slimrt.kv.choice import choose
from slimrt.kv.layer_rows import LayerRows
from slimrt.kv.offload import OffloadedKVCache
from slimrt.kv.ring import Transfers
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.ops.protocol import Fetched
from tests.deferred_ops import DeferredOps, ForgetfulOps, TooEarly
from tests.kv_schedule import HEADS, KV_HEADS, LAYERS, WIDTH, Schedule, sizes

SMALL = CacheConfig(1 << 20, 16, block=4, unit=2, sink_blocks=1, local_blocks=1, lookahead=2, decay=0, choose_every=1)
CUTS = ((1, 0.5), (3, 0.5))


def steps() -> st.SearchStrategy:
    share = st.floats(0, 1)
    return st.one_of(
        st.tuples(st.just("read"), st.integers(1, 40)),
        st.tuples(st.just("decode"), st.integers(1, 12)),
        st.tuples(st.just("ask"), st.integers(1, 20), st.integers(0, LAYERS - 2), share, share),
        st.tuples(st.just("truncate"), share),
        st.tuples(st.just("break"), st.integers(1, 20), st.integers(0, LAYERS - 1)),
        st.tuples(st.just("stop"), st.integers(1, 20), st.integers(0, LAYERS - 1)),
        st.tuples(st.just("copy")),
    )


@st.composite
def configs(draw: st.DrawFn) -> CacheConfig:
    unit = draw(st.sampled_from([1, 2, 4]))
    sink, local = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    block = unit * draw(st.sampled_from([1, 2, 4]))
    return CacheConfig(
        1 << 20,
        budget=block * (sink + local + 1 + draw(st.integers(0, 6))),
        block=block,
        unit=unit,
        sink_blocks=sink,
        local_blocks=local,
        overlap=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        decay=draw(st.sampled_from([0.0, 0.85, 1.0])),
        choose_every=draw(st.integers(1, 3)),
        lookahead=draw(st.integers(1, 3)),
        score=draw(st.sampled_from(["token_max", "token_mass"])),
    )


@settings(max_examples=300)
@given(config=configs(), schedule=st.lists(steps(), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_any_schedule_against_a_dictionary(config: CacheConfig, schedule: list[tuple], seed: int) -> None:
    run = Schedule(DeferredOps(), config, seed)
    for kind, *values in schedule:
        match kind:
            case "read":
                run.read(values[0])
            case "decode":
                for _ in range(values[0]):
                    run.read(1)
            case "ask":
                count, layer, first, second = values
                run.read(count, cuts=[(layer, first), (layer + 1, second)])
            case "truncate":
                run.truncate(int(values[0] * (run.length + 1)))
            case "break":
                run.break_off(*values)
            case "stop":
                run.read(values[0], layers=values[1])
            case "copy":
                run.replace_by_copy()
    run.check_all()


def long_schedule(run: Schedule) -> None:
    """Everything that a conversation does to its cache."""
    run.read(50)
    for _ in range(40):
        run.read(1)
    run.read(20)
    run.read(9, cuts=CUTS)
    for _ in range(20):
        run.read(1)
    run.read(9, cuts=CUTS)
    run.truncate(70)
    for _ in range(6):
        run.read(1)
    run.read(30)
    run.break_off(20, 3)
    run.read(1)
    run.truncate(10)
    run.read(2)
    run.read(30)
    run.check_all()
    run.truncate(0)
    for _ in range(30):
        run.read(1)
    run.read(20)
    run.check_all()


def test_the_same_with_a_copying_thread() -> None:
    ops = NumpyOps(1)
    for seed in range(5):
        long_schedule(Schedule(ops, SMALL, seed))
    ops.close()


def waiting_places() -> list[str]:
    ops = ForgetfulOps()
    long_schedule(Schedule(ops, SMALL))
    return sorted(ops.places)


def test_no_wait_is_missing_and_none_is_idle() -> None:
    """The schedule passes on a backend that is as late as it may be, and fails when any one place does not wait."""
    places = waiting_places()
    assert len(places) >= 6
    for place in places:
        with pytest.raises(AssertionError):
            long_schedule(Schedule(ForgetfulOps(place), SMALL))


def test_copies_come_after_what_compute_does() -> None:
    class NoOrder(DeferredOps):
        def copy(self, pairs, after=None):  # type: ignore[no-untyped-def]
            return super().copy(pairs, None)

    class OldMarks(DeferredOps):
        def mark(self):  # type: ignore[no-untyped-def]
            self.first = getattr(self, "first", None) or super().mark()
            return self.first

    for ops in (NoOrder(), OldMarks()):
        with pytest.raises(TooEarly):
            long_schedule(Schedule(ops, SMALL))


def test_a_failed_copy_surfaces_and_can_be_recovered_from() -> None:
    ops = DeferredOps()
    long_schedule(Schedule(ops, SMALL))
    for number in range(0, ops.copies, 37):
        run = Schedule(DeferredOps(fail_at=number), SMALL)
        with pytest.raises((ValueError, ComputeError), match=r"could not broadcast|lost when a copy failed"):
            long_schedule(run)
        assert not run.cache.intact
        with pytest.raises(ComputeError, match="start the conversation again"):
            run.read(1)
        run.truncate(0)
        assert run.cache.intact
        long_schedule(run)


def test_choose() -> None:
    config = CacheConfig(1000, budget=6 * 4, block=4, unit=2, sink_blocks=1, local_blocks=2)
    scores = np.array([0, 5, 1, 9, 5, 3, 0, 0], np.float32)
    chosen = choose(scores, 8, config)
    assert (chosen.complete.tolist(), chosen.tail) == ([0, 1, 3, 6, 7], 8)  # 1 and 4 tie
    latest = choose(None, 8, config)
    assert (latest.complete.tolist(), latest.tail) == ([0, 4, 5, 6, 7], 8)
    assert choose(None, 3, config).complete.tolist() == [0, 1, 2]
    assert scores.tolist() == [0, 5, 1, 9, 5, 3, 0, 0]
    assert chosen.overlap(latest) == latest.overlap(chosen) == 4 / 6  # 0, 6, 7 and the tail


def test_decode_reads_the_blocks_that_the_query_wants() -> None:
    """The query is the longest key of a head, so no key fits it better: its block is read whatever else is."""
    config = CacheConfig(1 << 20, 24, block=4, unit=1, sink_blocks=1, local_blocks=1, shortlist=100, choose_every=1)
    run = Schedule(NumpyOps(1), config)
    run.read(200)
    for turn in range(3):
        for layer in range(LAYERS):
            keys, _, _ = run.cache.rows(layer)
            wanted = int(np.linalg.norm(keys[1], axis=1).argmax())
            q = np.zeros((1, HEADS, WIDTH), np.float32)
            q[0, -1] = keys[1, wanted] * 20
            k = np.zeros((1, KV_HEADS, WIDTH), np.float32)
            _, _, positions = run.cache.update(layer, k, k, np.array([200 + turn]), q)
            block = wanted // 4 * 4
            assert {block, block + 1, block + 2, block + 3} <= set(positions.tolist())
            run.cache.attended(layer)
    run.ops.close()


class Counting(DeferredOps):
    """Counts choices: in a context this short one score each."""

    chosen = 0

    def score_blocks(self, *args):  # type: ignore[no-untyped-def]
        self.chosen += 1
        return super().score_blocks(*args)


def test_a_long_context_is_searched_in_groups() -> None:
    """The shortlist is the groups whose mean key is best, and their blocks are compared as all blocks would be."""

    class Recording(NumpyOps):
        seen = 0

        def score_blocks(self, kind, q, k, block, unit):  # type: ignore[no-untyped-def]
            self.seen += k.shape[1]
            return super().score_blocks(kind, q, k, block, unit)

    def layer(ops: NumpyOps, config: CacheConfig, keys: np.ndarray, steps: list[int]) -> LayerRows:
        rows = LayerRows(ops, config, sizes(), Transfers())
        for first, last in itertools.pairwise(steps):  # in blocks, as they become complete
            rows.learn_means(keys[:, first * config.block : last * config.block], first, last)
        return rows

    rng = np.random.default_rng(5)
    ops = Recording(1)
    config = CacheConfig(1 << 20, 24, block=4, unit=2, local_blocks=1, group=3, shortlist=2)  # 12 blocks: 4 groups
    keys = rng.standard_normal((KV_HEADS, 400, WIDTH), dtype=np.float32)
    q = rng.standard_normal((1, HEADS, WIDTH), dtype=np.float32)
    rows = layer(ops, config, keys, [0, 1, 2, 31, 37, 38, 100])
    # Means of means, and scores, by the operations themselves: the same bits.
    means = ops.unit_means(keys, 2)
    groups = ops.score_blocks("token_max", q, ops.unit_means(means[:, : 99 * 2], 6), 1, 1)
    best = set(np.argsort(-groups)[:4].tolist())
    shortlist = [block for block in range(100) if block // 3 in best or block >= 99]
    found = rows.wanted(q, 100)
    assert np.flatnonzero(np.isfinite(found)).tolist() == shortlist
    units = np.concatenate([means[:, block * 2 : block * 2 + 2] for block in shortlist], axis=1)
    assert np.array_equal(found[shortlist], ops.score_blocks("token_max", q, units, 2, 1))
    compared = []
    for length in (2048, 8192, 65536):
        config = CacheConfig(1 << 20, 1024)
        blocks = length // config.block
        rows = layer(ops, config, rng.standard_normal((KV_HEADS, length, WIDTH), dtype=np.float32), [0, blocks])
        ops.seen = 0
        rows.wanted(q, blocks)
        compared.append(ops.seen)
    assert compared == [256, 64 + 512, 512 + 512]  # without groups 256, 1024, 8192
    ops.close()


def test_blocks_move_only_under_the_threshold() -> None:
    def moved(overlap: float) -> int:
        config = CacheConfig(1 << 20, 32, block=4, unit=2, local_blocks=1, overlap=overlap, choose_every=1)
        run = Schedule(Counting(), config)
        run.read(101)
        before, run.ops.chosen = run.cache.transfers.bytes_to_device, 0
        run.read(1)  # within the last block
        assert run.ops.chosen == LAYERS
        return run.cache.transfers.bytes_to_device - before

    assert moved(0.0) == 0
    # Random queries want other blocks; of 8 slots, some stay.
    assert 0 < moved(1.0) < LAYERS * 8 * 2 * 4 * KV_HEADS * WIDTH * 4


def test_what_decode_fetched_is_told() -> None:
    """Bytes, those that were there when compute came for them, and how often it waited: late copies, and a thread that
    copies at once."""
    config = CacheConfig(1 << 20, 32, block=4, unit=2, local_blocks=1, overlap=1.0, choose_every=1)
    block = 2 * 4 * KV_HEADS * WIDTH * 4

    class AtOnce(NumpyOps):
        def fetch_blocks(self, *args):  # type: ignore[no-untyped-def]
            fence = super().fetch_blocks(*args)
            fence.result()
            return fence

    class Itself(AtOnce):
        fetches_behind = False

    told = []
    for ops in (DeferredOps(), AtOnce(1), Itself(1)):
        run = Schedule(ops, config)
        run.read(101)
        assert run.cache.fetched == Fetched()  # a prompt's blocks come by other ways
        before = run.cache.transfers.bytes_to_device
        run.read(1)
        assert run.cache.fetched.nbytes == run.cache.transfers.bytes_to_device - before
        assert run.cache.fetched.nbytes % block == 0
        told.append(run.cache.fetched)
        ops.close()
    late, early, itself = told
    assert late.nbytes > 0 == late.in_time and 0 < late.waits <= LAYERS
    assert early == Fetched(late.nbytes, late.nbytes, 0) and itself == late
    assert (late + early).since(late) == early and Fetched().since(late) == Fetched()


def test_what_was_wanted_counts_less_with_each_token() -> None:
    """A layer's scores are the largest of each query's own, times ``decay`` for every row since."""
    rng = np.random.default_rng(7)
    ops = NumpyOps(1)
    keys = rng.standard_normal((KV_HEADS, 80, WIDTH), dtype=np.float32)
    queries = rng.standard_normal((3, 1, HEADS, WIDTH), dtype=np.float32) * 5
    for decay in (0.0, 0.5, 1.0):
        rows = LayerRows(
            ops, CacheConfig(1 << 20, 16, block=4, unit=2, local_blocks=1, decay=decay), sizes(), Transfers()
        )
        rows.learn_means(keys, 0, 20)
        ends = (80, 81, 83)  # the last comes two rows later
        for q, end in zip(queries, ends, strict=True):
            rows.positions.append(np.arange(len(rows), end))
            found = rows.wanted(q, 20)
        means = ops.unit_means(keys, 2)
        own = [ops.score_blocks("token_max", q, means, 2, 1) for q in queries]
        faded = [scores * np.float32(decay ** (83 - end)) for scores, end in zip(own, ends, strict=True)]
        assert np.array_equal(found, np.max(faded, axis=0) if decay else own[2])  # powers of .5 round nothing
        rows.forget_wishes()
        assert np.array_equal(rows.wanted(queries[1], 20), own[1])
    ops.close()


def test_layers_take_turns_to_choose() -> None:
    """Each layer chooses for every third token, and for the first of a new block, whose tail is another."""
    run = Schedule(Counting(), CacheConfig(1 << 20, 32, block=4, unit=2, local_blocks=1, choose_every=3))
    run.read(101)
    turns = []
    rows = range(101, 113)
    for _ in rows:
        run.ops.chosen = 0
        run.read(1)
        turns.append(run.ops.chosen)
    assert turns == [LAYERS if row % 4 == 0 else LAYERS // 3 for row in rows]


@pytest.mark.parametrize("budget", [1024, 2048])
def test_resident_rows_and_decode_work_do_not_grow(budget: int) -> None:
    config = CacheConfig(1 << 20, budget)
    model = sizes(n_layers=2)
    row = 2 * KV_HEADS * WIDTH * 4
    rng = np.random.default_rng(0)
    ops = NumpyOps(1)
    for length in (2048, 8192, 32768):
        cache = OffloadedKVCache(model, ops, config)
        k, v = rng.standard_normal((2, length, KV_HEADS, WIDTH), dtype=np.float32)
        q = rng.standard_normal((length, HEADS, WIDTH), dtype=np.float32)
        for layer in range(2):
            cache.update(layer, k, v, np.arange(length), q)
            cache.attended(layer)
        for layer in range(2):
            keys, _, _ = cache.update(layer, k[:1], v[:1], np.array([length]), q[:1])
            assert budget - config.block < keys.shape[1] <= budget
            cache.attended(layer)
        means = 2 * (length // config.unit + length // config.block // config.group) * row // 2
        assert cache.nbytes_device - means == 2 * (budget - config.block + 1) * row
        assert cache.nbytes_host == 2 * length * row
        cache.close()
    ops.close()
