"""Sentences to plant in a text, with what may be asked about them and how an answer begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slimrt.eval.words import ADJECTIVES, NOUNS

__all__ = ["Fact", "draw_facts", "guests", "two_hops"]

Rng = np.random.Generator

_FIRST = ("Anna", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ingrid", "Jonas", "Leila", "Marek")
_LAST = ("Abbott", "Bergman", "Castro", "Dvorak", "Engel", "Fischer", "Grant", "Haddad", "Iversen", "Jansen", "Keller")
_CITIES = (
    "Bergen",
    "Cairo",
    "Dublin",
    "Geneva",
    "Havana",
    "Krakow",
    "Lima",
    "Malta",
    "Naples",
    "Porto",
    "Riga",
    "Seoul",
)
_MONTHS = ("January", "March", "April", "June", "July", "August", "October", "November")
_METALS = ("copper", "brass", "silver", "nickel", "titanium", "bronze")


@dataclass(frozen=True)
class Fact:
    """``sentences`` to plant, apart from each other. ``opening``: how an answer begins, up to ``answer``, which the
    sentences tell. ``subject``: whom or what it is about; ``field``: what a form would ask for."""

    sentences: tuple[str, ...]
    question: str
    opening: str
    answer: str
    subject: str
    field: str


def _pick(rng: Rng, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _person(rng: Rng) -> str:
    return f"{_pick(rng, _FIRST)} {_pick(rng, _LAST)}"


def _thing(rng: Rng) -> str:
    return f"{_pick(rng, ADJECTIVES)} {_pick(rng, NOUNS)}"


def _pin(rng: Rng) -> Fact:
    name, pin = _pick(rng, NOUNS).capitalize(), str(rng.integers(1000, 10000))
    return Fact(
        (f"The door of the {name} room opens with the number {pin}.",),
        f"Which number opens the door of the {name} room?",
        f"The door of the {name} room opens with the number",
        f" {pin}",
        f"the {name} room",
        f"Number that opens the {name} room",
    )


def _city(rng: Rng) -> Fact:
    who, city = _person(rng), _pick(rng, _CITIES)
    return Fact(
        (f"After the exhibition {who} settled in {city} for good.",),
        f"Where did {who} settle after the exhibition?",
        f"After the exhibition {who} settled in",
        f" {city}",
        who,
        f"City in which {who} settled",
    )


def _month(rng: Rng) -> Fact:
    thing, month = _thing(rng), _pick(rng, _MONTHS)
    return Fact(
        (f"The festival of the {thing} is held each year in {month}.",),
        f"In which month is the festival of the {thing} held?",
        f"The festival of the {thing} is held each year in",
        f" {month}",
        f"the festival of the {thing}",
        f"Month of the festival of the {thing}",
    )


def _metal(rng: Rng) -> Fact:
    thing, metal = _thing(rng), _pick(rng, _METALS)
    return Fact(
        (f"Visitors are surprised that the {thing} in the hall is cast in {metal}.",),
        f"Of which metal is the {thing} in the hall?",
        f"The {thing} in the hall is cast in",
        f" {metal}",
        f"the {thing} in the hall",
        f"Metal of the {thing} in the hall",
    )


_KINDS: tuple[Callable[[Rng], Fact], ...] = (_pin, _city, _month, _metal)


def draw_facts(rng: Rng, count: int) -> list[Fact]:
    """``count`` facts of different kinds, as long as there are any."""
    kinds = rng.permutation(len(_KINDS))
    return [_KINDS[kinds[at % len(kinds)]](rng) for at in range(count)]


def two_hops(rng: Rng) -> Fact:
    """A fact in two sentences, of which the second is found by way of the first."""
    thing, who, city = _thing(rng), _person(rng), _pick(rng, _CITIES)
    return Fact(
        (f"The {thing} was lent to {who} last winter.", f"Everything that was lent to {who} is stored in {city}."),
        f"In which city is the {thing} stored?",
        f"The {thing} was lent to {who}, so it is stored in",
        f" {city}",
        f"the {thing}",
        f"City in which the {thing} is stored",
    )


def guests(rng: Rng) -> Fact:
    """A fact in three sentences that an answer lists in their order; what is asked of it is the last."""
    place = _pick(rng, NOUNS).capitalize()
    names = [f"{first} {_pick(rng, _LAST)}" for first in rng.permutation(_FIRST)[:3]]
    return Fact(
        tuple(f"One of the guests of the {place} inn was {name}." for name in names),
        f"Who were the guests of the {place} inn?",
        f"The guests of the {place} inn were {names[0]}, {names[1]} and",
        f" {names[2]}",
        f"the {place} inn",
        f"Guests of the {place} inn",
    )
