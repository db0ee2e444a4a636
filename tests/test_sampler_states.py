"""DRY, mirostat, dynamic temperature, XTC and top-n-sigma against llama.cpp's own samplers, and bad values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimrt.config import SamplingConfig
from slimrt.errors import SettingError
from slimrt.llama_cpp.options import sampling_config
from slimrt.sampler import Sampler
from slimrt.sampling.dry import dry_breakers, penalise_repetition
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile
from tests.drawn import distribution
from tests.tolerance import EPS32

GOLDEN = json.loads((Path(__file__).parent / "goldens/sampler/stateful.json").read_text())
ROWS = [np.array(row, np.float32) for row in GOLDEN["rows"]]
FILTERS = [
    pytest.param(row, result, id=f"{number}-{result['setting']}")
    for number, row in enumerate(ROWS)
    for result in GOLDEN["filters"][number]
]


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def naive32(scores: np.ndarray, s: dict[str, Any]) -> np.ndarray:
    """The draw's probabilities in float32: their error against float64 sets the tolerance for llama.cpp's."""
    temperature = np.float32(s["temperature"])
    if s.get("dynatemp_range") and len(scores) > 1:
        low = max(np.float32(0), temperature - np.float32(s["dynatemp_range"]))
        high = temperature + np.float32(s["dynatemp_range"])
        probs = softmax(scores)
        entropy = -(probs * np.log(probs)).sum() / np.log(np.float32(len(scores)))
        temperature = low + (high - low) * entropy ** np.float32(s.get("dynatemp_exponent", 1.0))
    return softmax(scores / temperature) if temperature else np.ones(1, np.float32)


@pytest.mark.parametrize(("row", "result"), FILTERS)
def test_same_tokens_and_probabilities_as_llama_cpp(row: np.ndarray, result: dict[str, Any]) -> None:
    setting = result["setting"]
    ids, probs = distribution(Sampler(SamplingConfig(**setting), len(row)), row, [])
    held = probs >= 2.0**-149  # llama.cpp's are float32
    ids, probs = ids[held], probs[held]
    assert set(ids.tolist()) == {int(id) for id in result["kept"]}
    naive = naive32(row[ids], setting)
    tolerance = 8 * max(np.abs(naive - probs).max(), np.finfo(np.float32).eps * probs.max())
    assert np.abs(probs - [result["kept"][str(id)] for id in ids.tolist()]).max() <= tolerance


@pytest.mark.parametrize("case", GOLDEN["mirostat"], ids=lambda case: str(case["setting"]))
def test_mirostat_follows_llama_cpp_token_by_token(case: dict[str, Any]) -> None:
    sampler = Sampler(SamplingConfig(**case["setting"]), len(ROWS[0]))
    assert sampler.mirostat is not None
    for at, step in enumerate(case["steps"]):
        ids, probs = distribution(sampler, ROWS[at % 3], [])
        assert len(ids) == step["kept"]
        drawn = float(probs[ids.tolist().index(step["drawn"])])
        logits = ROWS[at % 3][ids]
        wide = np.exp(logits.astype(np.float64) - logits.max())
        naive = np.exp(logits - logits.max())  # llama.cpp's softmax, in float32
        unit = np.abs(naive / naive.sum(dtype=np.float32) / (wide / wide.sum()) - 1).max()
        assert abs(drawn / step["p"] - 1) <= 8 * max(unit, EPS32)
        sampler.mirostat.drawn(drawn)  # go on from llama.cpp's draw


def test_mirostat_draws_and_learns() -> None:
    config = SamplingConfig(temperature=1.0, mirostat=2, mirostat_tau=2.0, mirostat_eta=0.2, seed=3)
    sampler = Sampler(config, len(ROWS[0]))
    surprises = []
    for at in range(600):
        ids, probs = distribution(sampler, ROWS[at % 3], [])
        surprises.append(-math.log2(probs[ids.tolist().index(sampler(ROWS[at % 3], []))]))
    assert sampler.mirostat is not None and sampler.mirostat.mu != 4.0
    some = surprises[100:]
    assert abs(np.mean(some) - 2.0) <= 4 * np.std(some) / math.sqrt(len(some))  # four standard errors; without it: 4.5


def test_mirostat_of_flat_logits_and_of_one_token() -> None:
    for version in (1, 2):
        config = SamplingConfig(temperature=1.0, mirostat=version, seed=0)
        assert len(distribution(Sampler(config, 64), np.zeros(64, np.float32), [])[0]) == 64
        alone = np.full(64, -np.inf, np.float32)
        alone[7] = 1.0
        assert Sampler(config, 64)(alone, []) == 7
        assert Sampler(SamplingConfig(mirostat=version), 64)(ROWS[0][:64], []) == ROWS[0][:64].argmax()


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(default_model))


@pytest.mark.parametrize("number", range(len(GOLDEN["dry"])))
def test_dry_subtracts_what_llama_cpp_subtracts(number: int, tokenizer: Tokenizer) -> None:
    case = GOLDEN["dry"][number]
    zeros = np.zeros(tokenizer.vocab_size, np.float32)
    for result in case["results"]:
        config = SamplingConfig(temperature=1.0, **result["setting"])
        breakers = dry_breakers(config.dry_sequence_breakers, tokenizer)
        changed = penalise_repetition(zeros, case["ids"], config, breakers)
        found = {str(id): -changed[id] for id in np.flatnonzero(changed).tolist()}
        # one rounding of the power and one of the product
        assert found == pytest.approx(result["penalties"], rel=4 * float(np.finfo(np.float32).eps)), result["setting"]
    assert not zeros.any()


def test_slimrt_llama_takes_mirostat_as_llama_cpp_does() -> None:
    config = sampling_config(0.8, 40, 0.95, 0.05, 1.0, 7, (2, 3.0, 0.2))
    assert (config.mirostat, config.mirostat_tau, config.mirostat_eta, config.temperature) == (2, 3.0, 0.2, 1.0)
    assert sampling_config(0.0, 40, 0.95, 0.05, 1.0, 7, (2, 3.0, 0.2)).greedy


def test_dry_changes_what_is_drawn() -> None:
    config = SamplingConfig(dry_multiplier=5.0, dry_allowed_length=1)
    scores = np.array([0.0, 3.0, 2.0, 0.0], np.float32)
    assert Sampler(config, 4)(scores, [3, 0, 1, 3, 0]) == 2  # 1 would make "3 0 1" stand there twice
    assert Sampler(config, 4, breakers={0: ((),)})(scores, [3, 0, 1, 3, 0]) == 1
    assert Sampler(config, 4)(scores, [3, 0, 1, 3, 2]) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mirostat": 3}, "mirostat 3: must be 1 or 2"),
        ({"mirostat_tau": -1}, "mirostat_tau -1"),
        ({"mirostat_eta": math.nan}, "mirostat_eta nan"),
        ({"dynatemp_range": -0.1}, "dynatemp_range -0.1"),
        ({"dynatemp_exponent": "x"}, "dynatemp_exponent 'x'"),
        ({"dry_base": 0.5}, "dry_base 0.5"),
        ({"dry_multiplier": -1}, "dry_multiplier -1"),
        ({"dry_allowed_length": 1.5}, "dry_allowed_length 1.5"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n -2"),
        ({"dry_sequence_breakers": "\n"}, "dry_sequence_breakers"),
        ({"dry_sequence_breakers": [""]}, "none of them empty"),
        ({"dry_sequence_breakers": 5}, "must be a list of texts"),
        ({"dry_sequence_breakers": ["x"] * 65}, "at most 64"),
    ],
)
def test_bad_values_are_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words) as error:
        SamplingConfig(**values)
    assert "\n" not in str(error.value)
