"""All cases, as data: tables of plans and flows, by what they are about."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache

from netapply.conformance.case import LEVELS, Case, Level


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case, in a fixed order. Names are unique."""
    from netapply.conformance.cases import changes, dns, families, inbound, layouts, lists, outbound, proven

    tables = (outbound, inbound, dns, families, lists, layouts, changes, proven)
    return tuple(case for table in tables for case in table.CASES)


def cases_of(level: Level, pattern: str = "") -> tuple[Case, ...]:
    """The cases of a level and of those below it, of which the name contains `pattern`, or matches it as a glob."""
    wanted = LEVELS[: LEVELS.index(level) + 1]
    return tuple(case for case in all_cases() if case.level in wanted and _named(case.name, pattern))


def _named(name: str, pattern: str) -> bool:
    return not pattern or pattern in name or fnmatchcase(name, pattern)
