"""Names and comments that a program gives, past the plan file's checks: refused before anything is touched."""

from __future__ import annotations

import pytest

import netapply
from netapply.backend import BUILT_IN
from netapply.errors import PlanError
from netapply.plan import CapturePlan, Interfaces, LogSettings
from netapply.ruleset import CgroupMatch, Chain, IfaceMatch, Log, Return, Rule, Ruleset, Table
from netapply.texts import find_faulty_texts
from tests import foreign
from tests.netns import Netns

BAD = ("a\0b", "a\nb", "\x1b[2J", "\udcff", "ü", "\u202e", "x" * 600)
QUOTED = ('a"b', "a\\b")


def of(rule: Rule) -> Ruleset:
    return Ruleset((Table("ip", "nat", (Chain("NETAPPLY_OUTPUT", (rule,)),)),))


def rules(text: str) -> tuple[Rule, ...]:
    return (
        Rule((), Return(), None, text),
        Rule((), Log(text)),
        Rule((IfaceMatch("out", text),), Return()),
        Rule((CgroupMatch(text, 1),), Return()),
    )


@pytest.mark.parametrize("text", BAD)
def test_what_the_kernel_or_a_terminal_would_trip_over_is_refused(text: str) -> None:
    for rule in rules(text):
        (fault,) = find_faulty_texts(of(rule))
        assert fault.value.isascii()
        assert fault.value.isprintable()


@pytest.mark.parametrize("text", QUOTED)
def test_quotes_are_refused_where_saves_put_quotes_around(text: str) -> None:
    comment, log, interface, cgroup = (tuple(find_faulty_texts(of(rule))) for rule in rules(text))
    assert comment and log and interface  # noqa: PT018 - one thing
    assert not cgroup


@pytest.mark.parametrize("most", [255, 29, 15, 511])
def test_the_longest_is_taken_and_one_more_is_not(most: int) -> None:
    rule = rules("x" * most)[(255, 29, 15, 511).index(most)]
    longer = rules("x" * (most + 1))[(255, 29, 15, 511).index(most)]
    assert not tuple(find_faulty_texts(of(rule)))
    assert len(tuple(find_faulty_texts(of(longer)))) == 1


@pytest.mark.parametrize("backend", BUILT_IN)
def test_nothing_is_touched_and_every_fault_is_told(netns: Netns, backend: str) -> None:
    before = foreign.picture(netns)
    plan = CapturePlan(interfaces=Interfaces(exclude=("eth\n0", "\udcff")), log=LogSettings("a\0b"))
    with netapply.open(netns.path) as capture, pytest.raises(PlanError) as raised:
        capture.apply(plan, backend=backend)
    assert {fault.value for fault in raised.value.faults} == {r"'eth\n0'", r"'\udcff'", r"'a\x00b'"}
    assert foreign.picture(netns) == before
