"""Tolerances by CONTRIBUTING's rule, for tests that have no golden with an error of its own beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import slimrt
from tests import reference

__all__ = ["EPS32", "EPS64", "SLACK", "doubles", "kl_apart", "logits_apart", "logprobs_apart"]

SLACK = 4  # times the error of the naive computation of the same precision
EPS32, EPS64 = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)


def doubles(expected: Any, roundings: int = 8) -> Any:
    """``expected`` but for some roundings of float64: the same numbers joined in another order."""
    return pytest.approx(expected, rel=roundings * EPS64, abs=0)


def logits_apart(llm: slimrt.LLM, ids: list[int]) -> float:
    """How much the logits of two float32 computations of ``ids`` may differ: each errs at most ``SLACK`` times as much
    as the naive one."""
    truth, naive = (reference.logits(llm.file, llm.config, ids, kind) for kind in (np.float64, np.float32))
    return float(2 * SLACK * np.abs(naive - truth).max())


def logprobs_apart(llm: slimrt.LLM, ids: list[int]) -> float:
    """The same of log-probabilities: a logit and the logarithm of the sum, each off by as much."""
    return 2 * logits_apart(llm, ids)


def kl_apart(kl: float, apart: float) -> float:
    """How much KL(p || q) may change where logits of q differ by ``apart`` at most.

    To first order by the sum of (p - q) times the differences, which Pinsker's inequality bounds; to second order by
    Hoeffding's lemma.
    """
    return apart * math.sqrt(2 * kl) + apart**2 / 2
