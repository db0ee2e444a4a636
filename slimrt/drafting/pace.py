"""How many tokens to guess: what a pass of several costs, measured, against how likely they are right."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["EACH_WITH_EXPERTS", "MOST", "Costs", "best_count"]

MOST = 15  # guesses at once: with the token before them the rows that a pass of decode takes
_WORTH = 1.05  # guessing must promise so many tokens in the time of one
_EACH = 0.3  # of a token's time: what each further one of a pass takes, until it was measured
EACH_WITH_EXPERTS = 0.8  # where it reads matrices of its own
_SHARE = 0.1  # of a new measurement
_OUTLIER = 4.0  # times what a token takes by itself: kernels were compiled, or another program ran


class Costs:
    """What passes of one engine cost: seconds of a token by itself, and what each further token adds, as a share of
    that. A straight line: the weights are read once, the arithmetic is done for each."""

    def __init__(self, each: float = _EACH) -> None:
        """``each``: what a further token adds, until it was measured."""
        self.one: float | None = None
        self.each = each
        self.guess = 0.0  # of a token by itself: what it takes to guess one (a draft model's)

    def note(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        if tokens == 1:
            usual = self.one is None or seconds < _OUTLIER * self.one
            self.one = _mixed(self.one, seconds) if usual else self.one
        elif self.one and seconds < _OUTLIER * tokens * self.one:
            each = (seconds / self.one - 1) / (tokens - 1)
            self.each = _mixed(self.each, min(1.0, max(0.02, each)))

    def note_guess(self, seconds: float) -> None:
        """Guessing a token took so long."""
        if self.one:
            self.guess = _mixed(self.guess or None, min(seconds / self.one, _OUTLIER))

    def of(self, guesses: int) -> float:
        """Tokens by themselves that a pass with so many guesses costs."""
        return 1 + guesses * (self.each + self.guess)


def best_count(chances: Sequence[float], costs: Costs) -> int:
    """How many guesses bring most tokens for their time, 0 where none do; ``chances``: that the first n are right, for
    n = 1, 2, ..."""
    best, count, tokens = _WORTH, 0, 1.0
    for number, chance in enumerate(chances, 1):
        tokens += chance
        value = tokens / costs.of(number)
        if value > best:
            best, count = value, number
    return count


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + _SHARE * (new - old)
