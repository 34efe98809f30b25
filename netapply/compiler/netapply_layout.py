"""The default layout: chains of ours, a jump to each from the built-in one, lists as sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netapply.compiler import decisions
from netapply.compiler.decisions import Capture
from netapply.compiler.layout import Part, TableName
from netapply.compiler.terms import IS_SYN, IS_TCP, IS_UDP, ON_LO, Terms, logged, rule
from netapply.decide import DNS_PORT, ZONE_CAPTURED, ZONE_DIRECT
from netapply.plan import Everything, Placement
from netapply.ruleset import (
    Accept,
    Cidr,
    ConnmarkMatch,
    Drop,
    Family,
    IfaceMatch,
    Jump,
    MarkMatch,
    Match,
    PortMatch,
    PortRange,
    Redirect,
    Return,
    Rule,
    SetConnmark,
    SetMark,
    SetZone,
    SocketMatch,
    StateMatch,
    Statement,
    TProxy,
)

OUTBOUND, INBOUND, QUERY, DIVERT = "NETAPPLY_OUTBOUND", "NETAPPLY_INBOUND", "NETAPPLY_QUERY", "NETAPPLY_DIVERT"
INVALID, CAPTURE, INCLUDED = "NETAPPLY_INVALID", "NETAPPLY_CAPTURE", "NETAPPLY_INCLUDED"
BLOCK_OUTBOUND, BLOCK_INBOUND = "NETAPPLY_BLOCK_OUTBOUND", "NETAPPLY_BLOCK_INBOUND"
BLOCK_REROUTED, BLOCK_INCLUDED = "NETAPPLY_BLOCK_REROUTED", "NETAPPLY_BLOCK_INCLUDED"
#: In native nftables a listener of the any address is a socket too, to which a new connection would be diverted.
IS_NEW, IS_ESTABLISHED = StateMatch(("new",)), StateMatch(("established",))
FROM_LO = IfaceMatch("in", "lo")
OPENS = (IS_TCP, IS_SYN)


def parts(terms: Terms) -> Iterator[Part]:
    """Every part of the rule set, in the order raw, mangle, nat."""
    captured: tuple[Family, ...] = ("ip", "ip6") if terms.plan.ipv6 == "capture" else ("ip",)
    programmed: tuple[Family, ...] = ("ip",) if terms.plan.ipv6 == "skip" else ("ip", "ip6")
    yield from _zones(terms, captured)
    if terms.plan.invalid != "keep":
        left = decisions.leave_interfaces(terms, "in") if terms.plan.invalid == "drop" else ()
        rules = (*left, rule("invalid", Drop(), StateMatch(("invalid",))))
        yield from _hang(terms, "mangle", "PREROUTING", INVALID, rules, programmed, "invalid", ())
    if terms.plan.inbound.mode == "tproxy" and terms.plan.inbound.ports.include:
        yield from _tproxy(terms, captured)
    if terms.plan.ipv6 == "block":
        yield from blocked(terms)
    yield from _nat(terms, captured)


def _hang(
    terms: Terms,
    table: TableName,
    hook: str,
    chain: str,
    rules: Iterable[Rule],
    families: tuple[Family, ...],
    path: str,
    *guards: tuple[Match, ...],
) -> Iterator[Part]:
    """A chain of ours, and the jumps to it from the built-in chain `hook`, one for each of `guards`."""
    plan = terms.plan
    place: Placement = plan.inbound.placement if hook == "PREROUTING" else plan.outbound.placement
    jumps = tuple(rule(path, Jump(chain), *guard) for guard in guards)
    yield Part(table, hook, jumps, families, place)
    yield Part(table, chain, tuple(rules), families)


def _outbound(
    terms: Terms,
    table: TableName,
    chains: tuple[str, str],
    capture: Capture,
    families: tuple[Family, ...],
    path: str,
    *guards: tuple[Match, ...],
) -> Iterator[Part]:
    """What hook output decides about; the second of `chains` is for owners that are listed."""
    chain, included = chains
    rules = [*logged(terms.plan, decisions.outbound(terms, capture))]
    rest = tuple(logged(terms.plan, decisions.outbound_included(terms, capture)))
    include = terms.plan.outbound.owners.include
    if include == "*":
        yield from _hang(terms, table, "OUTPUT", chain, (*rules, *rest), families, path, *guards)
        return
    owned = [*decisions.each_owner(terms, Jump(included), include)]
    yield from _hang(terms, table, "OUTPUT", chain, rules + owned, families, path, *guards)
    yield Part(table, included, rest if owned else (), families)


def _nat(terms: Terms, families: tuple[Family, ...]) -> Iterator[Part]:
    plan = terms.plan
    to_outbound, to_inbound = Redirect(plan.proxy.outbound_port), Redirect(plan.proxy.inbound_port)
    inbound = _rerouted(terms, to_outbound)
    if plan.inbound.mode == "redirect":
        inbound += decisions.leave_interfaces(terms, "in")
        inbound += decisions.inbound_exempt(terms)
        inbound += decisions.inbound_capture(terms, to_inbound)
    yield from _hang(terms, "nat", "PREROUTING", INBOUND, logged(plan, inbound), families, "inbound", OPENS)
    capture, guards = Capture(to_outbound, to_inbound, None), (OPENS, *_queries(terms))
    yield from _outbound(terms, "nat", (OUTBOUND, INCLUDED), capture, families, "outbound", *guards)


def _rerouted(terms: Terms, statement: Statement) -> list[Rule]:
    """Interfaces that are rerouted; where TPROXY comes before that, without what it has taken."""
    taken = decisions.tproxied(terms, Return()) if terms.plan.inbound.tproxy.before_reroute else ()
    rerouted = [*decisions.reroutes(terms, statement)]
    return [*taken, *rerouted] if rerouted else []


def _queries(terms: Terms, *more: Match) -> Iterator[tuple[Match, ...]]:
    """The guard of what else may be captured in hook output: queries over UDP."""
    if terms.plan.dns.capture != "none":
        yield (IS_UDP, *more)


def _tproxy(terms: Terms, families: tuple[Family, ...]) -> Iterator[Part]:
    """Inbound TPROXY. The mark brings to `lo`: captured packets, answers to a proxy that borrows client addresses.

    All packets of TCP come here, those of the proxy's connections to be diverted; only what opens one is captured.
    """
    plan = terms.plan
    mark, path = plan.inbound.tproxy.mark, "inbound.tproxy.mark"
    is_marked = MarkMatch(mark.value, mark.mask)
    reroutes = (
        rule("interfaces.reroute", Return(), IfaceMatch("in", each.interface)) for each in plan.interfaces.reroute
    )
    port = plan.inbound.tproxy.port or plan.proxy.inbound_port
    capture = decisions.inbound_capture(terms, TProxy(port, mark.value, mark.mask))
    inbound = (
        *(() if plan.inbound.tproxy.before_reroute else reroutes),
        *decisions.leave_interfaces(terms, "in"),
        rule(path, SetConnmark(mark.value, mark.mask), is_marked),
        rule("inbound.mode", Return(), FROM_LO),
        *decisions.inbound_exempt(terms),
        rule("inbound.mode", Jump(DIVERT), IS_ESTABLISHED, SocketMatch()),
        rule("inbound.mode", Jump(CAPTURE), *OPENS, IS_NEW),
    )
    yield from _hang(terms, "mangle", "PREROUTING", INBOUND, inbound, families, "inbound", (IS_TCP,))
    yield Part("mangle", CAPTURE, tuple(logged(plan, capture)), families)
    divert = (rule(path, SetMark(mark.value, mark.mask)), rule("inbound.mode", Accept()))
    yield Part("mangle", DIVERT, divert, families)
    answers = (
        rule(path, Return(), is_marked),
        rule(path, SetMark(mark.value, mark.mask), ConnmarkMatch(mark.value, mark.mask)),
    )
    yield from _hang(terms, "mangle", "OUTPUT", OUTBOUND, answers, families, "inbound", (IS_TCP,))


def blocked(terms: Terms) -> Iterator[Part]:
    """IPv6 that would have been captured is dropped; what would have passed passes."""
    plan = terms.plan
    rerouted, inbound = _rerouted(terms, Drop()), list[Rule]()
    if plan.inbound.mode != "none":
        inbound += decisions.leave_interfaces(terms, "in")
        inbound += [rule("inbound.mode", Return(), FROM_LO), *decisions.inbound_exempt(terms)]
        inbound += decisions.inbound_capture(terms, Drop())
    only: tuple[Family, ...] = ("ip6",)
    chains = {BLOCK_INBOUND: rerouted + inbound}
    if plan.inbound.mode == "tproxy" and plan.inbound.tproxy.before_reroute and rerouted:
        chains = {BLOCK_INBOUND: inbound, BLOCK_REROUTED: rerouted}  # what the first lets pass comes to the second
    for chain, rules in chains.items():
        yield from _hang(terms, "mangle", "PREROUTING", chain, logged(plan, rules), only, "ipv6", (*OPENS, IS_NEW))
    capture, guards = Capture(Drop(), Drop(), Drop()), ((*OPENS, IS_NEW), *_queries(terms, IS_NEW))
    yield from _outbound(terms, "mangle", (BLOCK_OUTBOUND, BLOCK_INCLUDED), capture, only, "ipv6", *guards)


def _zones(terms: Terms, families: tuple[Family, ...]) -> Iterator[Part]:
    """UDP DNS in two conntrack zones: queries that the proxy answers, and queries that reach a server."""
    dns = terms.plan.dns
    if dns.capture == "none" or not dns.zones or dns.addresses:
        return
    servers: Everything | tuple[Cidr, ...] = "*" if dns.capture == "all" else dns.servers
    port_53 = (PortRange(DNS_PORT, DNS_PORT),)
    answer = PortMatch("src", (PortRange(dns.port, dns.port),))
    path, direct, taken = "dns.zones", SetZone(ZONE_DIRECT), SetZone(ZONE_CAPTURED)
    outbound = [
        *decisions.leave_interfaces(terms, "out"),
        *(rule(path, taken, IS_UDP, answer, own) for _, own in terms.own()),
    ]
    for family, matches in terms.addresses("dst", servers):
        outbound.append(rule(path, Jump(QUERY), IS_UDP, PortMatch("dst", port_53), *matches, family=family))
    for family, matches in terms.addresses("src", servers):
        outbound.append(rule(path, direct, ON_LO, IS_UDP, PortMatch("src", port_53), *matches, family=family))
    yield from _hang(terms, "raw", "OUTPUT", OUTBOUND, outbound, families, path, (IS_UDP,))
    spares, include = dns.udp_exempt == "outbound", terms.plan.outbound.owners.include
    listed = [*decisions.each_owner(terms, taken, include)] if spares and include != "*" else None
    query = (  # the first zone that is set stays
        *(decisions.exempt(terms, direct, (IS_UDP,)) if spares else ()),
        *decisions.leave_own(terms, direct),
        *(decisions.leave_owners(terms, direct) if spares else ()),
        *(listed or ()),
        rule(path, taken if listed is None else direct),
    )
    yield Part("raw", QUERY, query, families)
    inbound = [*decisions.leave_interfaces(terms, "in")]
    for family, matches in terms.addresses("src", servers):
        inbound.append(rule(path, direct, IS_UDP, PortMatch("src", port_53), *matches, family=family))
    yield from _hang(terms, "raw", "PREROUTING", INBOUND, inbound, families, path, (IS_UDP,))
