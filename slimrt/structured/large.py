"""Whole numbers that the grammar's compiler, which counts in float64, does not keep."""

from __future__ import annotations

import math
from typing import Any

from slimrt.errors import SettingError

__all__ = ["bound_within", "check_kept"]

_EXACT = 2**53  # up to here every whole number is a float64
_LEAST, _MOST = -(2**63), 2**63 - 1024  # and these are the float64 that end what it counts in


def bound_within(name: str, value: int) -> int:
    """The bound ``name`` ("minimum", ...) moved inwards to the next that is kept, so that nothing invalid is let in.

    Raises SettingError where no number within it can be written."""
    if abs(value) <= _EXACT:
        return value
    upper = name in ("maximum", "exclusiveMaximum")
    kept = min(value, _MOST) if upper else max(value, _LEAST)
    if not _LEAST <= kept <= _MOST:
        raise SettingError(
            f"schema: {name} {str(value)[:40]}: whole numbers lie within 64 bits; ask for a string of digits instead"
        )
    near = float(kept)
    if upper and near > kept:
        near = math.nextafter(near, -math.inf)
    elif not upper and near < kept:
        near = math.nextafter(near, math.inf)
    return int(near)


def check_kept(value: Any) -> None:
    """Raise SettingError where ``value``, of a ``const`` or ``enum``, holds a number that would become another."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list):
            left += one
        elif isinstance(one, int) and abs(one) > _EXACT and (abs(one) > _MOST or float(one) != one):
            raise SettingError(
                f"schema: the number {str(one)[:40]} in a const or enum is past 2^53 and would be written as another; "
                "ask for a string of digits instead"
            )
