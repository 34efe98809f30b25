"""The plan's decisions as rules, in the order in which they are taken. Layouts arrange them; none decides otherwise.

Each function yields the rules of one group. What capturing means (redirect, TPROXY, drop for a blocked family, a
conntrack zone) is the caller's statement.
"""

from __future__ import annotations

from collections.abc import Iterator

from netapply.compiler.terms import IS_TCP, IS_UDP, ON_LO, Term, Terms, rule
from netapply.decide import DNS_PORT
from netapply.plan import Everything, Owners
from netapply.ruleset import (
    Cidr,
    Dnat,
    Family,
    IfaceMatch,
    MarkMatch,
    Match,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Redirect,
    Return,
    Rule,
    Statement,
)
from netapply.values import NamedTuple

QUERY_PORT = (PortRange(DNS_PORT, DNS_PORT),)
PROTOCOLS = {"tcp": IS_TCP, "udp": IS_UDP}


class Capture(NamedTuple):
    """What becomes of captured flows in one place: to the proxy's ports, or, for a blocked family, dropped."""

    outbound: Statement
    inbound: Statement
    dns: Statement | None


def leave_interfaces(terms: Terms, direction: str) -> Iterator[Rule]:
    """Excluded interfaces are left alone."""
    for name in terms.plan.interfaces.exclude:
        yield rule("interfaces.exclude", Return(), IfaceMatch("in" if direction == "in" else "out", name))


def exempt(terms: Terms, statement: Statement, protocols: tuple[ProtocolMatch, ...]) -> Iterator[Rule]:
    """Flows that leave before any owner is looked at: excluded ports, exceptions, passthrough and probe addresses."""
    plan = terms.plan
    for match in terms.ports("dst", plan.outbound.ports.exclude):
        for protocol in protocols:
            yield rule("outbound.ports.exclude", statement, protocol, match)
    for index, exception in enumerate(plan.outbound.exclude_for_owners):
        protocol = PROTOCOLS[exception.protocol]
        if protocol in protocols:
            for chunk in terms.port_choices("dst", exception.ports):
                for owner in terms.owners(exception.owners):
                    yield rule(f"outbound.exclude_for_owners[{index}]", statement, protocol, *chunk, owner)
    for family, matches in terms.addresses("src", plan.proxy.passthrough_sources):
        yield rule("proxy.passthrough_sources", statement, ON_LO, *matches, family=family)
    yield from tproxied(terms, statement)
    for family, matches in terms.addresses("dst", plan.proxy.probe_sources):
        yield rule("proxy.probe_sources", statement, *matches, family=family)


def tproxied(terms: Terms, statement: Statement) -> Iterator[Rule]:
    """The proxy's connections to the application, on behalf of those that came by TPROXY."""
    tproxy = terms.plan.inbound.tproxy
    if terms.plan.inbound.mode == "tproxy":
        yield rule("inbound.tproxy.mark", statement, MarkMatch(tproxy.mark.value, tproxy.mark.mask))


def self_calls(terms: Terms, statement: Statement) -> Iterator[Rule]:
    """Calls over `lo` to an address of one's own, which the proxy's inbound side is to see."""
    plan = terms.plan
    callers = plan.proxy.self_calls
    if callers == "none":
        return
    tunnel = plan.proxy.tunnel_port if "self-calls" in plan.proxy.tunnel_exempt else None
    spared = [PortRange(tunnel, tunnel)] if tunnel else []
    spared += QUERY_PORT if plan.dns.capture != "none" else ()
    ports = (PortMatch("dst", tuple(sorted(set(spared))), negate=True),) if spared else ()
    if callers == "everyone":
        owners: list[tuple[Match, ...]] = [()]
    elif callers == "proxy":
        owners = [(match,) for _, match in terms.own()]
    else:
        owners = [(match,) for match in terms.owners(callers)]
    for owner in owners:
        for family, far in _own_addresses(terms):
            yield rule("proxy.self_calls", statement, ON_LO, IS_TCP, *far, *ports, *owner, family=family)


def self_queries(terms: Terms, statement: Statement) -> Iterator[Rule]:
    """DNS queries over TCP to an address of one's own, where these go inbound too."""
    if terms.plan.dns.capture == "none":
        return
    strangers = [OwnerMatch("uid", uid, uid, negate=True) for uid in terms.plan.proxy.uids]
    port = PortMatch("dst", QUERY_PORT)
    for owner in terms.owners(terms.plan.dns.self_calls):
        for family, far in _own_addresses(terms):
            yield rule("dns.self_calls", statement, ON_LO, IS_TCP, *far, port, *strangers, owner, family=family)


def _own_addresses(terms: Terms) -> Iterator[Term]:
    families: tuple[Family, ...] = ("ip", "ip6")
    for family in families:
        own = [block for block in terms.plan.proxy.loopback if block.family == family]
        if any(not block.prefix for block in own):
            continue  # all of the family is loopback: no address is left to call
        yield family, tuple(match for _, matches in terms.addresses("dst", own, negate=True) for match in matches)


def leave_own(terms: Terms, statement: Statement) -> Iterator[Rule]:
    """The proxy's own traffic."""
    for path, match in terms.own():
        yield rule(path, statement, match)


def leave_loopback(terms: Terms) -> Iterator[Rule]:
    """What applications say to one another over `lo`; DNS queries apart, where these are captured."""
    plan = terms.plan
    if plan.outbound.loopback == "capture":
        return
    if plan.dns.capture == "none":
        yield rule("outbound.loopback", Return(), ON_LO)
        return
    for protocol in (IS_TCP, IS_UDP):
        yield rule("outbound.loopback", Return(), ON_LO, protocol, PortMatch("dst", QUERY_PORT, negate=True))


def leave_owners(terms: Terms, statement: Statement) -> Iterator[Rule]:
    """Owners whose traffic is not captured."""
    for match in terms.owners(terms.plan.outbound.owners.exclude):
        yield rule("outbound.owners.exclude", statement, match)


def each_owner(terms: Terms, statement: Statement, include: Owners) -> Iterator[Rule]:
    """Owners whose traffic alone is captured, each by itself: nft_socket cannot tell who is not in a cgroup."""
    for match in terms.owners(include):
        yield rule("outbound.owners.include", statement, match)


def udp_queries(terms: Terms, statement: Statement | None) -> Iterator[Rule]:
    """Queries over UDP, where nothing but being the proxy's own exempts them."""
    if terms.plan.dns.capture == "none" or terms.plan.dns.udp_exempt == "outbound":
        return
    query = PortMatch("dst", QUERY_PORT)
    for path, match in terms.own():
        yield rule(path, Return(), IS_UDP, query, match)
    yield from dns(terms, statement, (IS_UDP,))
    yield rule("outbound", Return(), IS_UDP, query)


def dns(
    terms: Terms, statement: Statement | None, protocols: tuple[ProtocolMatch, ...] = (IS_UDP, IS_TCP)
) -> Iterator[Rule]:
    """Queries to port 53. `statement` None means what the plan says: redirect, or DNAT to its addresses."""
    settings = terms.plan.dns
    if settings.capture == "none":
        return
    path = "dns.servers" if settings.capture == "servers" else "dns.capture"
    servers: Everything | tuple[Cidr, ...] = "*" if settings.capture == "all" else settings.servers
    for family, answer in _answers(terms, statement):
        for of, matches in terms.addresses("dst", servers):
            if family is None or of is None or of == family:
                for protocol in protocols:
                    query = PortMatch("dst", QUERY_PORT)
                    yield rule(path, answer, protocol, query, *matches, family=of or family)


def _answers(terms: Terms, statement: Statement | None) -> Iterator[tuple[Family | None, Statement]]:
    settings = terms.plan.dns
    if not settings.addresses:
        yield None, statement or Redirect(settings.port)
        return
    for address in settings.addresses:
        yield "ip" if len(address) == 4 else "ip6", statement or Dnat(address, settings.port)


def outbound_tcp(terms: Terms, statement: Statement) -> Iterator[Rule]:
    """The rest of TCP: exclusions first, then what is included."""
    plan = terms.plan
    for family, matches in terms.addresses("dst", plan.proxy.loopback):
        yield rule("proxy.loopback", Return(), *matches, family=family)
    for family, matches in terms.addresses("dst", plan.outbound.cidrs.exclude):
        yield rule("outbound.cidrs.exclude", Return(), *matches, family=family)
    everything = plan.outbound.cidrs.include == "*"
    if not everything:
        for match in terms.ports("dst", plan.outbound.ports.include):
            yield rule("outbound.ports.include", statement, IS_TCP, match)
    for family, matches in terms.addresses("dst", plan.outbound.cidrs.include):
        yield rule("outbound.cidrs.include", statement, IS_TCP, *matches, family=family)


def outbound(terms: Terms, capture: Capture) -> Iterator[Rule]:
    """What hook output decides about before it is asked whose traffic is captured; then comes `outbound_included`."""
    protocols = (IS_TCP, IS_UDP) if terms.plan.dns.capture != "none" else (IS_TCP,)
    yield from leave_interfaces(terms, "out")
    yield from udp_queries(terms, capture.dns)
    yield from exempt(terms, Return(), protocols)
    yield from self_calls(terms, capture.inbound)
    yield from self_queries(terms, capture.inbound)
    yield from leave_own(terms, Return())
    yield from leave_loopback(terms)
    yield from leave_owners(terms, Return())


def outbound_included(terms: Terms, capture: Capture) -> Iterator[Rule]:
    """What it decides about the traffic of owners that are captured."""
    yield from dns(terms, capture.dns)
    yield from outbound_tcp(terms, capture.outbound)


def reroutes(terms: Terms, statement: Statement) -> Iterator[Rule]:
    """Interfaces whose inbound traffic is treated as outbound, and nothing else of it is captured."""
    cidrs = terms.plan.outbound.cidrs
    for index, reroute in enumerate(terms.plan.interfaces.reroute):
        path, enters = f"interfaces.reroute[{index}]", IfaceMatch("in", reroute.interface)
        exclude = cidrs.exclude if reroute.exclude is None else reroute.exclude
        include = cidrs.include if reroute.include is None else reroute.include
        for family, matches in terms.addresses("dst", exclude):
            yield rule(path, Return(), enters, *matches, family=family)
        for family, matches in terms.addresses("dst", include):
            yield rule(path, statement, enters, IS_TCP, *matches, family=family)
        yield rule(path, Return(), enters)


def inbound_exempt(terms: Terms) -> Iterator[Rule]:
    """Inbound TCP that is left alone: a proxied packet on its second way, probes, sources, ports."""
    plan = terms.plan
    yield from tproxied(terms, Return())
    for family, matches in terms.addresses("src", plan.proxy.probe_sources):
        yield rule("proxy.probe_sources", Return(), *matches, family=family)
    for family, matches in terms.addresses("src", plan.inbound.sources.exclude):
        yield rule("inbound.sources.exclude", Return(), *matches, family=family)
    for family, matches in terms.addresses("dst", plan.inbound.destinations.exclude):
        yield rule("inbound.destinations.exclude", Return(), *matches, family=family)
    if plan.proxy.tunnel_port and "inbound" in plan.proxy.tunnel_exempt:
        tunnel = PortRange(plan.proxy.tunnel_port, plan.proxy.tunnel_port)
        yield rule("proxy.tunnel_port", Return(), IS_TCP, PortMatch("dst", (tunnel,)))
    for match in terms.ports("dst", plan.inbound.ports.exclude):
        yield rule("inbound.ports.exclude", Return(), IS_TCP, match)


def inbound_capture(terms: Terms, statement: Statement) -> Iterator[Rule]:
    """Inbound TCP that goes to the proxy."""
    for match in terms.port_choices("dst", terms.plan.inbound.ports.include):
        yield rule("inbound.ports.include", statement, IS_TCP, *match)
