"""Istio's layouts: the same decisions in Istio's chains, rule for rule as istio-iptables of three versions has them.

Where a version decides otherwise the plan says so; `netapply.compiler.istio_words` refuses plans that ask for what
that version cannot say. In native nftables, where Istio's own tables are no model, the default layout is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from netapply.compiler import istio_words, netapply_layout
from netapply.compiler.decisions import QUERY_PORT
from netapply.compiler.istio_1_4 import outbound_1_4, tproxy_1_4
from netapply.compiler.istio_chains import (
    INBOUND,
    OUTPUT,
    OUTPUT_DNS,
    TO_IN_REDIRECT,
    TO_REDIRECT,
    Place,
    both_families,
    dns_families,
    each_port,
    far,
    loopback,
    one,
    outbound_rest,
    owners,
    passthrough,
    place,
    single,
)
from netapply.compiler.istio_dns import queries, tcp_queries_1_11, udp_queries_1_11, zones
from netapply.compiler.istio_mangle import invalid, tproxy
from netapply.compiler.layout import Part, TableName
from netapply.compiler.terms import IS_TCP, IS_UDP, ON_LO, Terms, logged, rule
from netapply.ruleset import IfaceMatch, Jump, Match, OwnerMatch, PortMatch, Redirect, Return, Rule
from netapply.values import NamedTuple


class Version(NamedTuple):
    """What a version of istio-iptables says otherwise than the others."""

    name: istio_words.Name
    #: The jump from OUTPUT takes TCP alone, and DNS over UDP stands beside it.
    tcp_only: bool = False
    #: Chains REDIRECT, IN_REDIRECT, INBOUND hold the tunnel's port.
    tunnel: bool = True


def parts(terms: Terms) -> Iterator[Part]:
    """Today's Istio."""
    return _parts(terms, Version("istio"))


def parts_1_11(terms: Terms) -> Iterator[Part]:
    """Istio 1.11."""
    return _parts(terms, Version("istio-1.11", tcp_only=True))


def parts_1_4(terms: Terms) -> Iterator[Part]:
    """Istio 1.4, the shell script."""
    return _parts(terms, Version("istio-1.4", tcp_only=True, tunnel=False))


def _parts(terms: Terms, version: Version) -> Iterator[Part]:
    if terms.native:
        yield from netapply_layout.parts(terms)
        return
    istio_words.refuse(terms.plan, version.name, tproxy=terms.tproxy)
    for part in _split(terms, version):
        yield part._replace(rules=tuple(logged(terms.plan, part.rules)))


def _split(terms: Terms, version: Version) -> Iterator[Part]:
    plan = terms.plan
    at = both_families(plan)
    yield from zones(terms, at, chains=not version.tcp_only)
    if terms.tproxy:
        yield from _excluded(terms, at, "mangle")
    if plan.invalid != "keep":
        yield from invalid(at)
    if plan.inbound.mode == "tproxy":
        yield from tproxy(terms, at) if version.tunnel else tproxy_1_4(terms, at)
    yield from _reroutes(terms, at)
    yield from _excluded(terms, at, "nat")
    yield from _inbound(terms, version, at)
    yield place(at, "nat", "OUTPUT", rule("outbound", Jump(OUTPUT), *((IS_TCP,) if version.tcp_only else ())))
    if version.name == "istio-1.4":
        yield place(at, "nat", OUTPUT, *outbound_1_4(terms))
    else:
        yield place(at, "nat", OUTPUT, *_outbound(terms, version))
        yield from queries(terms, at) if version.name == "istio" else udp_queries_1_11(terms, at)


def _excluded(terms: Terms, at: Place, table: TableName) -> Iterator[Part]:
    for name in terms.plan.interfaces.exclude:
        path = "interfaces.exclude"
        yield place(at, table, "PREROUTING", rule(path, Return(), IfaceMatch("in", name)))
        yield place(at, table, "OUTPUT", rule(path, Return(), IfaceMatch("out", name)))


def _reroutes(terms: Terms, at: Place) -> Iterator[Part]:
    """Istio inserts each rule at the first place, so the last one written stands first."""
    plan = terms.plan
    returns: list[Rule] = []
    captures: list[Rule] = []
    for index, each in enumerate(plan.interfaces.reroute):
        enters, path = IfaceMatch("in", each.interface), f"interfaces.reroute[{index}]"
        returns.append(rule(path, Return(), enters))
    include = plan.outbound.cidrs.include
    for family, matches in one("dst", include):
        for index, each in enumerate(plan.interfaces.reroute):
            enters, path = IfaceMatch("in", each.interface), f"interfaces.reroute[{index}]"
            nothing = each.include == ()  # 1.11 says so once more for IPv6
            captures.append(rule(path, Return() if nothing else TO_REDIRECT, enters, *matches, family=family))
    yield Part("nat", "PREROUTING", (*reversed(captures), *reversed(returns)), at.families, "first")


def _inbound(terms: Terms, version: Version, at: Place) -> Iterator[Part]:
    plan = terms.plan
    to_inbound = Redirect(plan.proxy.inbound_port)
    yield place(at, "nat", "ISTIO_REDIRECT", rule("proxy.outbound_port", Redirect(plan.proxy.outbound_port), IS_TCP))
    yield place(at, "nat", "ISTIO_IN_REDIRECT", rule("proxy.inbound_port", to_inbound, IS_TCP))
    if version.tunnel and plan.proxy.tunnel_port is not None:
        tunnel = PortMatch("dst", single(plan.proxy.tunnel_port))
        yield place(at, "nat", INBOUND, rule("proxy.tunnel_port", Return(), IS_TCP, tunnel))
    ports = plan.inbound.ports
    if plan.inbound.mode != "redirect" or not ports.include:
        return
    yield place(at, "nat", "PREROUTING", rule("inbound", Jump(INBOUND), IS_TCP))
    for item in ports.exclude:
        yield place(at, "nat", INBOUND, rule("inbound.ports.exclude", Return(), IS_TCP, PortMatch("dst", (item,))))
    for match in each_port(ports.include):
        yield place(at, "nat", INBOUND, rule("inbound.ports.include", TO_IN_REDIRECT, IS_TCP, *match))


def _outbound(terms: Terms, version: Version) -> Iterator[Rule]:
    plan = terms.plan
    for item in plan.outbound.ports.exclude:
        for protocol in (IS_TCP,) if version.tcp_only else (IS_TCP, IS_UDP):
            yield rule("outbound.ports.exclude", Return(), protocol, PortMatch("dst", (item,)))
    yield from passthrough(terms)
    for uid in plan.proxy.uids:
        yield from _owner(terms, version, "uid", uid)
    for gid in plan.proxy.gids:
        yield from _owner(terms, version, "gid", gid)
    yield from owners(terms)
    if plan.dns.capture != "none":
        if version.tcp_only:
            yield from tcp_queries_1_11(terms)
        else:
            for family in dns_families(terms.plan):
                yield rule("dns", Jump(OUTPUT_DNS), family=family)
    yield from loopback(terms)
    yield from outbound_rest(terms, end=version.tcp_only)


def _owner(terms: Terms, version: Version, kind: Literal["uid", "gid"], number: int) -> Iterator[Rule]:
    """One uid or gid of the proxy: its calls to itself, everybody else's over `lo`, and all that it sends."""
    plan = terms.plan
    own, path = OwnerMatch(kind, number, number), "proxy.uids" if kind == "uid" else "proxy.gids"
    dns = plan.dns.capture != "none"
    spared = QUERY_PORT if dns and kind == "uid" else ()
    if not version.tcp_only and plan.proxy.tunnel_port is not None:
        spared = (*spared, *single(plan.proxy.tunnel_port))  # in this order, even where both are the same
    ports: tuple[Match, ...] = (IS_TCP, PortMatch("dst", spared, negate=True)) if spared else ()
    for family, matches in far(terms):
        yield rule("proxy.self_calls", TO_IN_REDIRECT, ON_LO, *matches, *ports, own, family=family)
    if plan.outbound.loopback == "bypass":
        query: tuple[Match, ...] = (IS_TCP, PortMatch("dst", QUERY_PORT, negate=True)) if dns else ()
        yield rule("outbound.loopback", Return(), ON_LO, *query, own._replace(negate=True))
    yield rule(path, Return(), own)
