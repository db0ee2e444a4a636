"""What one rendering of a chat template may cost, and the prices of operations that multiply."""

from __future__ import annotations

import re
import time
from typing import Any

from jinja2 import TemplateRuntimeError

__all__ = ["BUDGET", "Budget", "BudgetError", "check_bits", "check_product", "check_width", "percent_format"]

_STEP = 64  # what a loop pass or a call costs, in characters
_UNITS = 1 << 25  # half a million steps, or 32M characters
_PER_CHARACTER = 64  # so often may a template handle each character of the messages
_SECONDS = 1.0  # a backstop for single operations that are slow for their size, such as sorting
_MAX_NUMBER_BITS = 4096
_MAX_FIELD = 3  # digits of a width or precision in a format string

BUDGET = "budget:left"  # the render variable that holds the Budget; not an identifier, so no template can name it


class BudgetError(TemplateRuntimeError):
    """The template wants more time or memory than any chat needs."""


class Budget:
    """What one rendering may still do: characters written or copied, loop passes and calls, processor time."""

    def __init__(self, characters: int) -> None:
        """``characters``: the size of what is rendered."""
        self._left = _UNITS + _PER_CHARACTER * characters
        self._end = time.thread_time() + _SECONDS

    def spend(self, units: int) -> None:
        """So many characters. Raises BudgetError, as all do."""
        if units < 0:  # a template that reached the weaver's own filters by way of map()
            raise BudgetError("it gives itself a larger budget")
        self._left -= units
        if self._left < 0:
            raise BudgetError("it loops or writes far more than these messages call for")

    def step(self, units: int = 0) -> None:
        """A loop pass or a call, which writes so many characters."""
        self.spend(_STEP + units)
        if time.thread_time() > self._end:
            raise BudgetError(f"it took more than {_SECONDS:g} s")

    def spend_value(self, value: Any) -> None:
        """Spend the size of ``value``: characters and, through nested containers, items, shared ones each time."""
        pending = [value]
        while pending:
            value = pending.pop()
            if isinstance(value, (str, bytes)):
                self.spend(len(value))
            elif isinstance(value, (list, tuple, set, frozenset)):
                self.spend(8 * len(value))
                pending.extend(value)
            elif isinstance(value, dict):
                self.spend(16 * len(value))
                pending.extend(value)
                pending.extend(value.values())


def check_product(budget: Budget, left: Any, right: Any) -> None:
    """Pay for ``left * right`` before it is computed. Raises BudgetError."""
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() + right.bit_length())
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(times, int):
            budget.spend(len(value) * max(times, 0))


def check_bits(bits: int) -> None:
    """Raise BudgetError for whole numbers so large that arithmetic with them takes long."""
    if bits > _MAX_NUMBER_BITS:
        raise BudgetError(f"it computes with a number of {bits} bits")


def check_width(spec: str) -> None:
    """Raise BudgetError for a format field that pads by thousands."""
    if re.search(rf"\*|\d{{{_MAX_FIELD + 1}}}", spec):
        raise BudgetError(f"a format field has a width of more than {_MAX_FIELD} digits")


def percent_format(budget: Budget, text: str, values: Any) -> str:
    """``text % values``, paid for before it is written. Raises BudgetError."""
    for spec in re.findall(r"%(?:\([^)]*\))?([^a-zA-Z%]*)", text):
        check_width(spec)
    longest = values if isinstance(values, tuple) else tuple(values.values()) if isinstance(values, dict) else (values,)
    size = max((len(value) for value in longest if isinstance(value, str)), default=0)
    budget.spend(len(text) + text.count("%") * size)
    result = text % values
    budget.spend(len(result))
    return result
