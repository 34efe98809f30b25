"""Istio's rules for DNS: in chains of their own today, straight in the built-in chains in 1.11."""

from __future__ import annotations

from collections.abc import Iterator

from netapply.compiler.decisions import QUERY_PORT
from netapply.compiler.istio_chains import INBOUND, OUTPUT_DNS, Place, dns_families, one, place, single
from netapply.compiler.layout import Part
from netapply.compiler.terms import IS_TCP, IS_UDP, Terms, rule
from netapply.decide import ZONE_CAPTURED, ZONE_DIRECT
from netapply.plan import CapturePlan, Everything
from netapply.ruleset import Cidr, Jump, PortMatch, ProtocolMatch, Redirect, Return, Rule, SetZone

QUERY, ANSWER = PortMatch("dst", QUERY_PORT), PortMatch("src", QUERY_PORT)
PATH = "dns.capture"


def _servers(plan: CapturePlan) -> Everything | tuple[Cidr, ...]:
    return "*" if plan.dns.capture == "all" else plan.dns.servers


def _redirects(terms: Terms, protocol: ProtocolMatch) -> Iterator[Rule]:
    answer = Redirect(terms.plan.dns.port)
    for family, matches in one("dst", _servers(terms.plan)):
        yield rule(PATH, answer, protocol, QUERY, *matches, family=family)


def queries(terms: Terms, at: Place) -> Iterator[Part]:
    """Chain ISTIO_OUTPUT_DNS of table nat."""
    if terms.plan.dns.capture != "none":
        yield place(at, "nat", OUTPUT_DNS, *_redirects(terms, IS_TCP), *_redirects(terms, IS_UDP))


def tcp_queries_1_11(terms: Terms) -> Iterator[Rule]:
    """Queries over TCP, inside ISTIO_OUTPUT."""
    return _redirects(terms, IS_TCP)


def udp_queries_1_11(terms: Terms, at: Place) -> Iterator[Part]:
    """Queries over UDP, in OUTPUT after the jump."""
    if terms.plan.dns.capture == "none":
        return
    own = (rule(path, Return(), IS_UDP, QUERY, match) for path, match in terms.own())
    yield place(_with_ipv4(terms, at), "nat", "OUTPUT", *own, *_redirects(terms, IS_UDP))


def zones(terms: Terms, at: Place, *, chains: bool) -> Iterator[Part]:
    """Conntrack zones. `chains`: in chains of Istio's; 1.11 tells an answer by its destination."""
    plan = terms.plan
    if plan.dns.capture == "none" or not plan.dns.zones:
        return
    at = at if chains else _with_ipv4(terms, at)
    path, direct, taken = "dns.zones", SetZone(ZONE_DIRECT), SetZone(ZONE_CAPTURED)
    own_answer = PortMatch("src", single(plan.dns.port))
    rules = [
        each
        for _, own in terms.own()
        for each in (rule(path, direct, IS_UDP, QUERY, own), rule(path, taken, IS_UDP, own_answer, own))
    ]
    for family, matches in one("dst", _servers(plan)):
        rules.append(rule(path, taken, IS_UDP, QUERY, *matches, family=family))
    answers = tuple(
        rule(path, direct, IS_UDP, ANSWER, *matches, family=family)
        for family, matches in one("src" if chains else "dst", _servers(plan))
    )
    if not chains:
        yield place(at, "raw", "PREROUTING", *answers)
        yield place(at, "raw", "OUTPUT", *rules)
        return
    yield place(_with_servers(terms, at), "raw", "PREROUTING", rule(path, Jump(INBOUND)))
    yield place(at, "raw", INBOUND, *answers)
    yield place(at, "raw", "OUTPUT", rule(path, Jump(OUTPUT_DNS)))
    yield place(at, "raw", OUTPUT_DNS, *rules)


def _with_servers(terms: Terms, at: Place) -> Place:
    mine = dns_families(terms.plan)
    return Place(tuple(family for family in at.families if family in mine))


def _with_ipv4(terms: Terms, at: Place) -> Place:
    """1.11 writes its rules for IPv4 even where no server is of it."""
    return Place(tuple(dict.fromkeys(("ip", *_with_servers(terms, at).families))))
