"""What became of a namespace in one try, and the sum of many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Outcome(NamedTuple):
    """One fault: of which class, in which dialect, where, what stood at once and what after the next command."""

    fault: str
    backend: str
    where: str
    #: "old", "new" or "between": some of the objects old and some new.
    at_once: str
    #: "old" or "new"; "" is neither, and a fault.
    state: str
    #: What should not be: a line each. None of them: nothing was lost.
    wrong: tuple[str, ...] = ()
    #: Whether counters of foreign rules were set back.
    counters: bool = False


class Sum(NamedTuple):
    """All tries of one class in one dialect."""

    tries: int
    between: int
    old: int
    new: int
    lost: int
    counters: int


def summed(outcomes: Iterable[Outcome]) -> dict[tuple[str, str], Sum]:
    """By class and dialect, in the order in which they first came."""
    found: dict[tuple[str, str], Sum] = {}
    for each in outcomes:
        key = (each.fault, each.backend)
        one = found.get(key, Sum(0, 0, 0, 0, 0, 0))
        lost = bool(each.wrong)
        found[key] = Sum(
            one.tries + 1,
            one.between + (each.at_once == "between"),
            one.old + (each.state == "old" and not lost),
            one.new + (each.state == "new" and not lost),
            one.lost + lost,
            one.counters + each.counters,
        )
    return found
