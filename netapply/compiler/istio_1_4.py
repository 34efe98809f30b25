"""Istio 1.4 where it differs from later versions: no owner in calls to oneself, `-m socket`, each port twice."""

from __future__ import annotations

from collections.abc import Iterator

from netapply.compiler.istio_chains import (
    INBOUND,
    TO_IN_REDIRECT,
    Place,
    each_port,
    far,
    loopback,
    outbound_rest,
    owners,
    passthrough,
    place,
)
from netapply.compiler.istio_mangle import DIVERT, TPROXY, chains
from netapply.compiler.layout import Part
from netapply.compiler.terms import IS_TCP, ON_LO, Terms, rule
from netapply.ruleset import Jump, Return, Rule, SocketMatch


def outbound_1_4(terms: Terms) -> Iterator[Rule]:
    """Chain ISTIO_OUTPUT."""
    for match in each_port(terms.plan.outbound.ports.exclude):
        yield rule("outbound.ports.exclude", Return(), IS_TCP, *match)
    yield from passthrough(terms)
    for family, matches in far(terms):
        yield rule("proxy.self_calls", TO_IN_REDIRECT, ON_LO, *matches, family=family)
    for path, match_own in terms.own():
        yield rule(path, Return(), match_own)
    yield from owners(terms)
    yield from loopback(terms)
    yield from outbound_rest(terms, end=True)


def tproxy_1_4(terms: Terms, at: Place) -> Iterator[Part]:
    """Inbound TPROXY."""
    ports = terms.plan.inbound.ports
    if not ports.include:
        return
    yield from chains(terms, at)
    yield place(at, "mangle", "PREROUTING", rule("inbound", Jump(INBOUND), IS_TCP))
    for match in each_port(ports.exclude):
        yield place(at, "mangle", INBOUND, rule("inbound.ports.exclude", Return(), IS_TCP, *match))
    divert = Jump(DIVERT)
    for match in each_port(ports.include):
        held = rule("inbound.mode", divert, IS_TCP, *match, SocketMatch(transparent=False))
        # The script writes this rule twice for a listed port, and once for all of them.
        yield place(at, "mangle", INBOUND, *((held, held) if match else (held,)))
        yield place(at, "mangle", INBOUND, rule("inbound.ports.include", Jump(TPROXY), IS_TCP, *match))
