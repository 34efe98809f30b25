"""Istio's rules in table mangle: inbound TPROXY, and invalid packets."""

from __future__ import annotations

from collections.abc import Iterator

from netapply.compiler.istio_chains import INBOUND, Place, each_port, far, one, place
from netapply.compiler.layout import Part
from netapply.compiler.terms import IS_TCP, ON_LO, Terms, rule
from netapply.ruleset import (
    Accept,
    ConnmarkMatch,
    Drop,
    IfaceMatch,
    Jump,
    MarkMatch,
    RestoreMark,
    Return,
    Rule,
    SaveMark,
    SetMark,
    StateMatch,
    TProxy,
)

DIVERT, TPROXY = "ISTIO_DIVERT", "ISTIO_TPROXY"
#: Istio's mark of the proxy's calls to its own address (constants.go: OutboundMark).
OUTBOUND_MARK = 1338
MODE, MARK = "inbound.mode", "inbound.tproxy.mark"
FROM_LO = IfaceMatch("in", "lo")


def invalid(at: Place) -> Iterator[Part]:
    """Packets that conntrack finds invalid."""
    yield place(at, "mangle", "PREROUTING", rule("invalid", Jump("ISTIO_DROP"), StateMatch(("invalid",))))
    yield place(at, "mangle", "ISTIO_DROP", rule("invalid", Drop()))


def chains(terms: Terms, at: Place) -> Iterator[Part]:
    """Chains DIVERT and TPROXY."""
    settings = terms.plan.inbound.tproxy
    mark = settings.mark
    yield place(at, "mangle", DIVERT, rule(MARK, SetMark(mark.value, mark.mask)), rule(MODE, Accept()))
    statement = TProxy(settings.port or terms.plan.proxy.inbound_port, mark.value, mark.mask)
    taken = [rule(MODE, statement, *matches, IS_TCP, family=family) for family, matches in far(terms)]
    yield place(at, "mangle", TPROXY, *taken)


def tproxy(terms: Terms, at: Place) -> Iterator[Part]:
    """Inbound TPROXY, and the marks by which a call to oneself is told from the proxy's to the application."""
    mark, ports = terms.plan.inbound.tproxy.mark, terms.plan.inbound.ports
    marked = MarkMatch(mark.value, mark.mask)
    if ports.include:
        yield from chains(terms, at)
        yield place(at, "mangle", "PREROUTING", rule("inbound", Jump(INBOUND), IS_TCP))
    yield place(at, "mangle", INBOUND, *_spared(terms, marked))
    for match in each_port(ports.exclude):
        yield place(at, "mangle", INBOUND, rule("inbound.ports.exclude", Return(), IS_TCP, *match))
    held = StateMatch(("established", "related"))
    for match in each_port(ports.include):
        yield place(at, "mangle", INBOUND, rule(MODE, Jump(DIVERT), IS_TCP, *match, held))
        yield place(at, "mangle", INBOUND, rule("inbound.ports.include", Jump(TPROXY), IS_TCP, *match))
    yield place(at, "mangle", "PREROUTING", rule(MARK, SaveMark(), IS_TCP, marked))
    yield place(at, "mangle", "OUTPUT", rule(MARK, Return(), ON_LO, IS_TCP, marked))
    for path, own in terms.own():
        for family, matches in far(terms):
            call = rule(path, SetMark(OUTBOUND_MARK), ON_LO, IS_TCP, *matches, own, family=family)
            yield place(at, "mangle", "OUTPUT", call)
    yield place(at, "mangle", "OUTPUT", rule(MARK, RestoreMark(), IS_TCP, ConnmarkMatch(mark.value, mark.mask)))


def _spared(terms: Terms, marked: MarkMatch) -> Iterator[Rule]:
    """Istio inserts these three at the head of ISTIO_INBOUND."""
    yield rule(MARK, Return(), IS_TCP, marked)
    for family, matches in one("src", terms.plan.proxy.passthrough_sources):
        yield rule("proxy.passthrough_sources", Return(), FROM_LO, IS_TCP, *matches, family=family)
    yield rule(MODE, Return(), FROM_LO, IS_TCP, MarkMatch(OUTBOUND_MARK, negate=True))
