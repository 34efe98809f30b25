"""What the versions of Istio's layout share: names of chains, one rule for each entry of a list."""

from __future__ import annotations

from collections.abc import Iterator

from netapply.compiler.decisions import leave_owners
from netapply.compiler.layout import Part, TableName
from netapply.compiler.terms import IS_TCP, ON_LO, Term, Terms, rule
from netapply.plan import CapturePlan, Everything
from netapply.ruleset import FAMILIES, AddressMatch, Cidr, Family, Jump, PortMatch, PortRange, Return, Rule, Side
from netapply.values import NamedTuple

INBOUND, OUTPUT, OUTPUT_DNS = "ISTIO_INBOUND", "ISTIO_OUTPUT", "ISTIO_OUTPUT_DNS"
TO_REDIRECT, TO_IN_REDIRECT = Jump("ISTIO_REDIRECT"), Jump("ISTIO_IN_REDIRECT")


class Place(NamedTuple):
    """The families that a part is for."""

    families: tuple[Family, ...]


def both_families(plan: CapturePlan) -> Place:
    """IPv4, and IPv6 where the plan wants it."""
    return Place(FAMILIES if plan.ipv6 == "capture" else ("ip",))


def place(at: Place, table: TableName, chain: str, *rules: Rule) -> Part:
    """Rules at the end of a chain, where Istio appends them."""
    return Part(table, chain, rules, at.families, "last")


def single(port: int) -> tuple[PortRange, ...]:
    """One port as ranges."""
    return (PortRange(port, port),)


def each_port(ports: Everything | tuple[PortRange, ...]) -> Iterator[tuple[PortMatch, ...]]:
    """A match for each entry, in the plan's order; one empty choice for "*"."""
    if isinstance(ports, str):
        yield ()
    else:
        yield from ((PortMatch("dst", (item,)),) for item in ports)


def one(side: Side, blocks: Everything | tuple[Cidr, ...]) -> Iterator[Term]:
    """A term for each block, in the plan's order, never a set; one empty term for "*"."""
    if isinstance(blocks, str):
        yield None, ()
        return
    for block in blocks:
        yield block.family, (AddressMatch(side, block),) if block.prefix else ()


def far(terms: Terms) -> Iterator[Term]:
    """Addresses of one's own that are not loopback. Istio has one block of loopback a family."""
    for block in terms.plan.proxy.loopback:
        yield block.family, (AddressMatch("dst", block, negate=True),)


def dns_families(plan: CapturePlan) -> tuple[Family, ...]:
    """The families in which queries are captured."""
    return FAMILIES if plan.dns.capture == "all" else families_of(plan.dns.servers)


def families_of(blocks: tuple[Cidr, ...]) -> tuple[Family, ...]:
    """The families of a list of blocks."""
    return tuple(family for family in FAMILIES if any(block.family == family for block in blocks))


def passthrough(terms: Terms) -> Iterator[Rule]:
    """What the proxy hands to the application."""
    for family, matches in one("src", terms.plan.proxy.passthrough_sources):
        yield rule("proxy.passthrough_sources", Return(), ON_LO, *matches, family=family)


def owners(terms: Terms) -> Iterator[Rule]:
    """Owners whose traffic is not captured: those that are listed, or all others."""
    yield from leave_owners(terms, Return())
    include = terms.plan.outbound.owners.include
    if include != "*":
        others = (match._replace(negate=True) for match in terms.owners(include))
        yield rule("outbound.owners.include", Return(), *others)


def loopback(terms: Terms) -> Iterator[Rule]:
    """Calls to localhost."""
    for family, matches in one("dst", terms.plan.proxy.loopback):
        yield rule("proxy.loopback", Return(), *matches, family=family)


def outbound_rest(terms: Terms, *, end: bool) -> Iterator[Rule]:
    """Exclusions, then what is included. `end`: older versions write the return at the end of a list of blocks."""
    outbound = terms.plan.outbound
    for family, matches in one("dst", outbound.cidrs.exclude):
        yield rule("outbound.cidrs.exclude", Return(), *matches, family=family)
    for match in each_port(outbound.ports.include):
        yield rule("outbound.ports.include", TO_REDIRECT, IS_TCP, *match)
    include = outbound.cidrs.include
    for family, matches in one("dst", include):
        yield rule("outbound.cidrs.include", TO_REDIRECT, *matches, family=family)
    if end and not isinstance(include, str):
        for family in families_of(include):
            yield rule("outbound.cidrs.include", Return(), family=family)
