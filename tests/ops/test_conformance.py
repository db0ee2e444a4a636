"""The same cases on every backend: a new one goes into ``BACKENDS``, beside a naive computation in its precision.

What is drawn from a case are logits; a backend may err ``SLACK`` times as much as the naive computation does, both
against NumPy in float32. Where a result must be the same whatever the precision, it is compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimrt.config import CacheConfig
from slimrt.engine import Engine
from slimrt.kv.restore import placed
from slimrt.models import build, read_config
from slimrt.ops.backend import fast_features
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.ops.protocol import Ops
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import EPS32

SLACK = 3  # they round in the same places; the order of sums differs
CUT = PrunePlan((Stage(0, 0.5), Stage(1, 0.25)), block=16, query_window=8)
KEEP_ALL = PrunePlan((Stage(0, 1.0), Stage(1, 1.0)), block=16)
Rows = list[np.ndarray]


def _numpy(monkeypatch: pytest.MonkeyPatch) -> tuple[Ops, NumpyOps]:
    from tests.half_ops import HalfOps

    return NumpyOps(2, packed=True), HalfOps()


def _fast(monkeypatch: pytest.MonkeyPatch) -> tuple[Ops, NumpyOps]:
    if fast_features()[0] is None:
        pytest.skip("this processor has no fast path")
    from slimrt.ops.fast.fast_ops import FastOps
    from tests.rounded_ops import RoundedOps

    return FastOps(2), RoundedOps()


def _cuda(monkeypatch: pytest.MonkeyPatch) -> tuple[Ops, NumpyOps]:
    from tests import emulation
    from tests.fake_cupy import FakeCupy
    from tests.half_ops import HalfOps

    if emulation.compiler() is None:
        pytest.skip("running CUDA sources on the CPU needs g++")
    FakeCupy(monkeypatch)
    from slimrt.ops.cuda.cupy_ops import CupyOps

    return CupyOps(), HalfOps()


BACKENDS: dict[str, Callable[[pytest.MonkeyPatch], tuple[Ops, NumpyOps]]] = {
    "numpy": _numpy,
    "fast": _fast,
    "cuda": _cuda,
}


@pytest.fixture(params=BACKENDS)
def backends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Ops, NumpyOps]:
    """A backend, and the naive computation in its precision."""
    return BACKENDS[request.param](monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    sizes = {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_model": 64, "d_ff": 96, "head_dim": 64}
    return GGUFFile(write_tiny_llama(tmp_path / "tiny.gguf", type="Q8_0", **sizes))


def ids(file: GGUFFile, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, read_config(file).vocab_size, count).tolist()


def session(file: GGUFFile, ops: Ops, budget: int | None = None) -> Session:
    return Session(Engine(build(read_config(file), file, ops), ops, CacheConfig(512, budget)), 512)


def logits(one: Session) -> np.ndarray:
    assert one.logits is not None
    return one.logits


def dense(file: GGUFFile, ops: Ops) -> Rows:
    """A prompt, a continued prompt, and tokens that are decoded."""
    one, prompt = session(file, ops), ids(file, 90)
    rows = []
    for end in (60, 90):
        one.prefill(prompt[:end])
        rows.append(logits(one))
    for token in prompt[:4]:
        one.extend([token])
        rows.append(logits(one))
    return rows


def within_a_budget(file: GGUFFile, ops: Ops) -> Rows:
    """A prompt that exceeds the resident rows is read exactly, also where it continues one."""
    one, prompt = session(file, ops, 96), ids(file, 200)
    rows = []
    for end in (150, 200):
        one.prefill(prompt[:end])
        rows.append(logits(one))
    return rows


@pytest.mark.parametrize("case", [dense, within_a_budget])
def test_logits(case: Callable[[GGUFFile, Ops], Rows], file: GGUFFile, backends: tuple[Ops, NumpyOps]) -> None:
    ops, naive = backends
    truth, unit, found = (np.stack(case(file, one)) for one in (NumpyOps(1), naive, ops))
    assert np.abs(found - truth).max() <= SLACK * np.abs(unit - truth).max()


PLACES = {
    "blocks": (range(64), range(128, 256), range(300, 330)),
    "anywhere": (range(3, 5), range(70, 141), range(250, 310)),
}


@pytest.mark.parametrize("how", [{}, {"reach": (64, 0)}, {"first": 40}], ids=str)
@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
def test_rows_that_attend_without_the_others_do_as_among_all(
    where: Sequence[range], how: dict[str, Any], backends: tuple[Ops, NumpyOps]
) -> None:
    ops, rng, places = backends[0], np.random.default_rng(3), np.concatenate([np.array(part) for part in where])
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((330, 4, 64), (2, 330, 64), (2, 330, 64)))
    some = dict(how)
    if "first" in how:  # a window of so many keys
        how = {"first": np.maximum(0, np.arange(330) - how["first"])}
        some = {"first": how["first"][places]}
    with ops.computing():
        keys, values = (placed(ops, x, ops.kv_type) for x in (k, v))
        queries, few = (placed(ops, x, ops.empty((0,)).dtype) for x in (q, q[places]))
        found = ops.floats(ops.attend(few, keys, values, places=places, **some))
        expected = ops.floats(ops.attend(queries, keys, values, **how))[places]
    # The kernels give a row the same bits in any company, the GPU's but for windows by row, whose tiles begin with the
    # first key of their first row; a BLAS library sums in an order that depends on it.
    unit = EPS32 if type(ops) is NumpyOps else 2**-10 if not isinstance(ops, NumpyOps) and "first" in how else 0
    off = SLACK * unit * np.abs(v).max()
    assert np.abs(found - expected).max() <= off


def test_a_plan_that_keeps_all_is_the_dense_run(file: GGUFFile, backends: tuple[Ops, NumpyOps]) -> None:
    plain, pruned, prompt = session(file, backends[0]), session(file, backends[0]), ids(file, 100)
    plain.prefill(prompt)
    pruned.prefill(prompt, KEEP_ALL)
    assert np.array_equal(logits(plain), logits(pruned))


def test_a_follow_up_is_a_fresh_prefill(file: GGUFFile, backends: tuple[Ops, NumpyOps]) -> None:
    """What is used again of a pruned prompt gives what reading it all gives: the same choice, and logits that differ by
    the order of sums at most, far less than the precision's own error."""
    document = ids(file, 150)
    question = [*document[:120], *ids(file, 20, seed=2)]

    def fresh(ops: Ops) -> Session:
        one = session(file, ops)
        one.prefill(question, CUT)
        return one

    again, whole = session(file, backends[0]), fresh(backends[0])
    again.prefill(document, CUT)
    reading = again.prefill(question, CUT)
    assert 0 < reading.reused <= 120
    assert [again.context.cache.length(n) for n in range(3)] == [whole.context.cache.length(n) for n in range(3)]
    unit = np.abs(logits(fresh(backends[1])) - logits(fresh(NumpyOps(1)))).max()
    assert np.abs(logits(again) - logits(whole)).max() <= unit / 2
