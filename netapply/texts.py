"""Names and comments in a rule set: what the kernel stores, tools show and files carry without harm. Pure.

A plan file's are held to the same and more while it is read; a plan that a program made has been through no such hands.
"""

from __future__ import annotations

from collections.abc import Iterator

from netapply.errors import Fault
from netapply.ruleset import CgroupMatch, IfaceMatch, Log, Rule, Ruleset

#: Bytes: XT_MAX_COMMENT_LEN, xt_log_info, IFNAMSIZ and xt_cgroup_info_v2, each without its NUL.
COMMENT, LOG_PREFIX, INTERFACE, CGROUP = 255, 29, 15, 511

_NO_QUOTES = ", without quotes and backslashes"
_BUT = {"a cgroup path": ""}  # systemd writes a dash in the name of a unit as \x2d


def find_faulty_texts(ruleset: Ruleset) -> Iterator[Fault]:
    """What is too long, or holds characters other than printable ASCII without quotes, once for each text."""
    told: set[str] = set()
    for table in ruleset.tables:
        for chain in table.chains:
            for rule in chain.head + chain.rules:
                for what, text, most in _texts(rule):
                    if not _is_plain(what, text, most) and text not in told:
                        told.add(text)
                        accepted = f"{what} has 1 to {most} printable ASCII characters{_BUT.get(what, _NO_QUOTES)}"
                        yield Fault(rule.path or f"{table.name} {chain.name}", ascii(text[:80]), accepted)


def _texts(rule: Rule) -> Iterator[tuple[str, str, int]]:
    if rule.comment:
        yield "a comment", rule.comment, COMMENT
    if isinstance(rule.statement, Log):
        yield "a log prefix", rule.statement.prefix, LOG_PREFIX
    for match in rule.matches:
        if isinstance(match, IfaceMatch):
            yield "an interface", match.name, INTERFACE
        elif isinstance(match, CgroupMatch):
            yield "a cgroup path", match.path, CGROUP


def _is_plain(what: str, text: str, most: int) -> bool:
    plain = 0 < len(text) <= most and text.isascii() and text.isprintable()
    return plain and (what in _BUT or ('"' not in text and "\\" not in text))
