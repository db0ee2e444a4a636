"""The sampler against llama.cpp's own samplers, against a slow reference, and against bad logits."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimrt.config import SamplingConfig
from slimrt.errors import ComputeError, SettingError
from slimrt.sampler import Sampler, apply_penalties, log_softmax, top_logprobs
from slimrt.sampling.filters import draw
from tests.drawn import distribution
from tests.tolerance import EPS32, SLACK

GOLDEN = json.loads((Path(__file__).parent / "goldens/sampler/llama_cpp.json").read_text())
GOLDEN_CASES = [
    pytest.param(case["logits"], case["context"], result, id=f"{number}-{result['setting']}")
    for number, case in enumerate(GOLDEN["cases"])
    for result in case["results"]
]


def softmax32(x: np.ndarray) -> np.ndarray:
    """The naive float32 computation, whose error sets the tolerance for llama.cpp's."""
    weights = np.exp(x - x.max())
    return weights / np.add.reduce(weights)


@pytest.mark.parametrize(("logits", "context", "result"), GOLDEN_CASES)
def test_same_tokens_and_probabilities_as_llama_cpp(logits: list[float], context: list[int], result: dict) -> None:
    config = SamplingConfig(**result["setting"])
    scores = np.array(logits, np.float32)
    ids, probs = distribution(Sampler(config, len(scores)), scores, context)
    expected = {int(id): p for id, p in result["kept"].items()}
    assert set(ids.tolist()) == set(expected)
    penalised = apply_penalties(scores, context, config)[ids]
    naive = softmax32(penalised / np.float32(config.temperature))
    tolerance = 8 * max(np.abs(naive - probs).max(), np.finfo(np.float32).eps * probs.max())
    assert np.abs(probs - [expected[id] for id in ids.tolist()]).max() <= tolerance


def reference(scores: list[float], context: list[int], c: SamplingConfig) -> dict[int, float]:
    """The chain written down plainly: lists, full sorts, float64."""
    values = dict(enumerate(scores))
    for id, bias in c.logit_bias.items():
        values[id] += bias
    counts = Counter(context if c.penalty_last_n < 0 else context[len(context) - min(c.penalty_last_n, len(context)) :])
    for id, count in counts.items():
        values[id] *= c.repeat_penalty if values[id] <= 0 else 1 / c.repeat_penalty
        values[id] -= count * c.frequency_penalty + c.presence_penalty

    def probabilities(temperature: float = 1.0) -> dict[int, float]:
        top = max(values.values())
        weights = {id: math.exp((value - top) / temperature) for id, value in values.items()}
        return {id: weight / sum(weights.values()) for id, weight in weights.items()}

    def keep(order: list[int], enough) -> dict[int, float]:
        mass, kept = 0.0, []
        for id in order:
            kept.append(id)
            mass += probs[id]
            if enough(mass):
                break
        return {id: values[id] for id in kept}

    def best_first() -> list[int]:
        return sorted(values, key=lambda id: (-values[id], id))

    if c.top_k:
        values = {id: values[id] for id in best_first()[: c.top_k]}
    if c.typical_p < 1:
        probs = probabilities()
        entropy = sum(-p * math.log(p) for p in probs.values() if p)
        surprise = {id: abs(-math.log(p) - entropy) if p else math.inf for id, p in probs.items()}
        values = keep(sorted(best_first(), key=lambda id: surprise[id]), lambda mass: mass > c.typical_p)
    if c.top_p < 1:
        probs = probabilities()
        values = keep(best_first(), lambda mass: mass >= c.top_p)
    if c.min_p:
        floor = max(values.values()) + math.log(c.min_p)
        values = {id: value for id, value in values.items() if value >= floor}
    return probabilities(c.temperature)


CONFIGS = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.0, 0.17, 0.51, 0.87, 1.0]),
    min_p=st.sampled_from([0.0, 0.031, 0.37]),
    typical_p=st.sampled_from([0.13, 0.57, 0.91, 1.0]),
    repeat_penalty=st.sampled_from([1.0, 1.25, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.75, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
    penalty_last_n=st.sampled_from([-1, 0, 3, 64]),
    logit_bias=st.dictionaries(st.integers(0, 9), st.sampled_from([-1.5, 2.0]), max_size=2),
)


@given(st.integers(0, 2**32), CONFIGS, st.lists(st.integers(0, 9), max_size=12))
def test_same_distribution_as_the_slow_reference(seed: int, config: SamplingConfig, context: list[int]) -> None:
    scores = np.random.default_rng(seed).standard_normal(10).astype(np.float32) * 3
    ids, probs = distribution(Sampler(config, 10), scores, context)
    expected = reference([float(x) for x in scores], context, config)
    # Bias, penalties and temperature round a logit to float32 four times; two of them make a ratio of probabilities.
    largest = np.abs(scores).max() * 2 + 4  # doubled by a penalty of .5 at most; bias, presence and frequency
    off = float(2 * 4 * EPS32 / 2 * (largest + 12 * 0.25) / config.temperature)
    assert dict(zip(ids.tolist(), probs, strict=True)) == pytest.approx(expected, rel=off, abs=0)


@pytest.mark.parametrize("spread", [0.05, 2.0, 20.0])  # flat (top-p needs more than the first guess) to peaked
@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=1, top_p=0.9),
        SamplingConfig(temperature=1, top_p=0.9, top_k=3000),
        SamplingConfig(temperature=1, typical_p=0.6, top_p=0.5),
        SamplingConfig(temperature=1, top_k=700, min_p=0.02),
    ],
)
def test_large_vocabulary_takes_the_same_tokens(spread: float, config: SamplingConfig) -> None:
    scores = (np.random.default_rng(3).standard_normal(5000) * spread).astype(np.float32)
    ids, probs = distribution(Sampler(config, 5000), scores, [])
    expected = reference([float(x) for x in scores], [], config)
    assert set(ids.tolist()) == set(expected)
    assert abs(probs.sum() - 1) <= len(probs) * EPS32


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=1, top_k=40),
        SamplingConfig(temperature=1, top_k=900),
        SamplingConfig(temperature=1, top_p=0.4),
        SamplingConfig(temperature=1, top_k=1000, top_p=0.3),
    ],
)
def test_of_equal_logits_in_a_large_vocabulary_the_lowest_ids_stay(config: SamplingConfig) -> None:
    scores = np.round(np.random.default_rng(4).standard_normal(20_000) * 2).astype(np.float32)
    scores[::3] = -np.inf
    ids, _ = distribution(Sampler(config, len(scores)), scores, [])
    left = {id: float(score) for id, score in enumerate(scores) if score > -np.inf}
    places = sorted(left)
    assert set(ids.tolist()) == {places[at] for at in reference([left[id] for id in places], [], config)}


@given(st.data())
def test_a_draw_is_the_token_that_a_plain_running_sum_finds(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 2, 255, 256, 257, 3000]))
    shares = np.random.default_rng(data.draw(st.integers(0, 99))).random(count, np.float32)
    shares[data.draw(st.integers(0, count - 1)) :] *= data.draw(st.sampled_from([0.0, 1e-30, 1.0]))  # what underflows
    shares[data.draw(st.integers(0, count - 1))] = 1
    point = data.draw(st.one_of(st.sampled_from([0.0, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)))
    place, probability = draw(shares, point)
    before, share, total = math.fsum(shares[:place]), float(shares[place]), math.fsum(shares)
    near = count * 2**-52 * total  # what sums in float64 may be off
    assert before - near <= point * total <= before + share + near
    assert share > 0 and abs(probability - share / total) <= count * 2**-52


def test_draws_follow_the_distribution() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingConfig(temperature=1, seed=11), 4)
    draws = 20_000
    counts = np.bincount([sampler(scores, []) for _ in range(draws)], minlength=4)
    expected = np.array([0.5, 0.3, 0.15, 0.05]) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 16.27  # chi-squared, 3 degrees of freedom, p = 0.001


def test_same_seed_same_tokens() -> None:
    scores = np.random.default_rng(0).standard_normal(1000).astype(np.float32)

    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingConfig(temperature=1.5, seed=seed), 1000)
        return [sampler(scores, []) for _ in range(20)]

    assert tokens(42) == tokens(42)
    assert tokens(42) != tokens(43)
    assert tokens(None) != tokens(None)


def test_greedy_is_the_likeliest_token_after_penalties() -> None:
    scores = np.array([1.0, 3.0, 2.0], np.float32)
    assert Sampler(SamplingConfig(), 3)(scores, []) == 1
    assert Sampler(SamplingConfig(repeat_penalty=2), 3)(scores, [1]) == 2
    assert Sampler(SamplingConfig(presence_penalty=1.5), 3)(scores, [1]) == 2
    assert Sampler(SamplingConfig(logit_bias={0: 5.0}), 3)(scores, []) == 0
    assert Sampler(SamplingConfig(logit_bias={0: np.float32(5)}), 3)(scores, []) == 0  # type: ignore[dict-item]
    assert Sampler(SamplingConfig(top_k=1, temperature=1), 3)(scores, []) == 1


def test_ties_go_to_the_lowest_id() -> None:
    flat = np.zeros(600, np.float32)
    assert Sampler(SamplingConfig(), 600)(flat, []) == 0
    for config in (
        SamplingConfig(temperature=1, top_k=3),
        SamplingConfig(temperature=1, top_p=2.5 / 600),
        SamplingConfig(temperature=1, top_k=500, top_p=2.5 / 500),
    ):
        assert distribution(Sampler(config, 600), flat, [])[0].tolist() == [0, 1, 2]
    wide = np.zeros(3000, np.float32)
    assert distribution(Sampler(SamplingConfig(temperature=1, top_p=0.001), 3000), wide, [])[0].tolist() == [0, 1, 2]
    likely = pytest.approx(-math.log(600), rel=SLACK * EPS32, abs=0)
    assert top_logprobs(flat, 5, 3).top == tuple((id, likely) for id in (0, 1, 2))


def test_logits_stay_as_they_are() -> None:
    scores = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    scores.flags.writeable = False

    def ban_all_but_seven(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[np.arange(len(logits)) != 7] = -np.inf
        return logits

    config = SamplingConfig(temperature=1, top_k=9, top_p=0.9, min_p=0.01, repeat_penalty=1.2, logit_bias={1: 1.0})
    assert 0 <= Sampler(config, 50)(scores, [1, 2, 3]) < 50
    assert Sampler(config, 50, [ban_all_but_seven])(scores, [1, 2, 3]) == 7
    assert Sampler(replace(config, logit_bias={}), 50, [ban_all_but_seven])(scores, []) == 7


def test_processors_run_in_order_and_see_the_ids_and_the_bias() -> None:
    seen: list[object] = []

    def first(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append((ids.tolist(), float(logits[2])))
        return logits * 2

    def second(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(float(logits[2]))
        return logits

    config = SamplingConfig(logit_bias={2: 1.0})
    assert Sampler(config, 3, [first, second])(np.array([0, 0, 4], np.float32), [8, 9]) == 2
    assert seen == [([8, 9], 5.0), 10.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("values", "words"),
    [([1, math.nan, 2], "nan"), ([-math.inf] * 3, "-inf"), ([0, math.inf, 1], "largest logit is inf")],
)
def test_bad_logits_are_refused(temperature: float, values: list[float], words: str) -> None:
    with pytest.raises(ComputeError, match=words):
        Sampler(SamplingConfig(temperature=temperature), 3)(np.array(values, np.float32), [])
    with pytest.raises(ComputeError, match=words):
        log_softmax(np.array(values, np.float32))


def test_banned_tokens_are_never_drawn() -> None:
    scores = np.array([-np.inf, 1, -np.inf, 0], np.float32)
    for config in (
        SamplingConfig(temperature=1e-30),
        SamplingConfig(temperature=math.inf),
        SamplingConfig(temperature=1, top_k=3),
    ):
        ids, probs = distribution(Sampler(config, 4), scores, [])
        assert set(ids.tolist()) <= {1, 3}
        assert abs(probs.sum() - 1) <= len(probs) * EPS32
    assert Sampler(SamplingConfig(temperature=1e-30), 4)(scores, []) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SamplingConfig(seed=-1), "seed -1"),
        (SamplingConfig(seed="x"), "seed 'x'"),  # type: ignore[arg-type]
        (SamplingConfig(logit_bias={5: 1.0}), "token 5"),
        (SamplingConfig(logit_bias={0: math.nan}), "nan"),
        (SamplingConfig(logit_bias={0: 1e39}), r"1e\+39 of token 0: must be a number from -3.40282e\+38"),
        (SamplingConfig(logit_bias={0: 10**400}), "of token 0: must be a number"),
    ],
)
def test_bad_settings_are_refused(config: SamplingConfig, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Sampler(config, 5)


def test_a_processor_of_the_wrong_shape_is_named() -> None:
    def halve(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        return logits[::2]

    with pytest.raises(SettingError, match=r"halve returned shape \(2,\)"):
        Sampler(SamplingConfig(), 4, [halve])(np.zeros(4, np.float32), [])


def test_logprobs_are_those_of_float64() -> None:
    logits = (np.random.default_rng(1).standard_normal(49152) * 5).astype(np.float32)
    wide = logits.astype(np.float64)
    exact = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    naive = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    tolerance = 4 * np.abs(naive - exact).max()
    assert log_softmax(logits).dtype == np.float32
    assert np.abs(log_softmax(logits) - exact).max() <= tolerance
    result = top_logprobs(logits, 17, 5)
    order = np.argsort(-logits, kind="stable")[:5]
    assert result.token == 17 and [id for id, _ in result.top] == order.tolist()
    assert np.abs([result.logprob, *(p for _, p in result.top)] - exact[[17, *order]]).max() <= tolerance
    assert top_logprobs(logits, 3, 0).top == ()
    assert len(top_logprobs(logits[:4], 3, 9).top) == 4


# The cases of llama.cpp's tests/test-sampling.cpp (test_top_n_sigma, test_xtc), whose tolerance is 1e-5.
FROM_LLAMA_CPP = [
    ([0.1, 0.2, 0.3, 0.4], {"top_n_sigma": 1.0}, [0.0, 0.0, 0.428571, 0.571429]),
    ([0.1, 0.2, 0.3, 0.4], {"top_n_sigma": 0.0}, [0.1, 0.2, 0.3, 0.4]),
    ([0.1, 0.2, 0.3, 0.4], {"top_n_sigma": 3.0}, [0.1, 0.2, 0.3, 0.4]),
    ([0.4, 0.3, 0.2, 0.1], {"xtc_probability": 1.0, "xtc_threshold": 0.09}, [0.0, 0.0, 0.0, 0.1]),
    ([0.4, 0.3, 0.2, 0.1], {"xtc_probability": 1.0, "xtc_threshold": 0.19}, [0.0, 0.0, 0.2, 0.1]),
    ([0.4, 0.3, 0.2, 0.1], {"xtc_probability": 1.0, "xtc_threshold": 0.29}, [0.0, 0.3, 0.2, 0.1]),
    ([0.4, 0.3, 0.2, 0.1], {"xtc_probability": 1.0, "xtc_threshold": 0.39}, [0.4, 0.3, 0.2, 0.1]),
]


@pytest.mark.parametrize(("probs", "settings", "expected"), FROM_LLAMA_CPP)
def test_top_n_sigma_and_xtc_keep_what_llama_cpp_keeps(
    probs: list[float], settings: dict[str, float], expected: list[float]
) -> None:
    sampler = Sampler(SamplingConfig(temperature=1.0, **settings), len(probs))  # type: ignore[arg-type]
    ids, shares = distribution(sampler, np.log(np.array(probs, np.float32)), [])
    found = np.zeros(len(probs))
    found[ids] = shares
    assert np.abs(found - np.array(expected) / sum(expected)).max() < 1e-5  # llama.cpp's, whose numbers have six digits


def test_xtc_excludes_as_often_as_it_is_told() -> None:
    config = SamplingConfig(temperature=1.0, xtc_probability=0.3, xtc_threshold=0.25, seed=0)
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    sampler = Sampler(config, 4)
    ids, shares = distribution(sampler, logits, [])
    drawn = np.bincount([sampler(logits, []) for _ in range(8000)], minlength=4) / 8000
    expected = np.zeros(4)
    expected[ids] = shares
    assert abs(expected.sum() - 1) < 1e-12 and abs(expected[0] - 0.28) <= SLACK * EPS32
    assert np.abs(drawn - expected).max() < 4 * np.sqrt(0.25 / 8000)
