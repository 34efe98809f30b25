"""Plans that are possible and doubtful: exemptions too wide, loops, entries that never match. Pure.

    for warning in lint(plan):
        print(warning.path, warning.message, warning.advice)

Each rule is a small generator in the table `RULES`. What cannot work at all is a fault of the plan file instead
(`netapply.contradictions`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netapply.plan import CapturePlan, IdRange, Owners, plan_of
from netapply.ruleset import FAMILIES, Cidr, Family
from netapply.spans import Spans, span_of
from netapply.spelling import write_address, write_cidr, write_mark, write_range
from netapply.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from netapply.fields import Redundant

DNS_PORT = 53
#: Every address of a family.
_ALL: dict[Family, Cidr] = {"ip": Cidr(bytes(4), 0), "ip6": Cidr(bytes(16), 0)}
_LOOPBACK = Spans.of_blocks((Cidr(b"\x7f\0\0\0", 8), Cidr(b"\0" * 15 + b"\1", 128)))


class LintWarning(NamedTuple):
    """A doubt about a plan: where, what will happen, and what to do about it."""

    path: str
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}; {self.advice}"


# --- exemptions ----------------------------------------------------------------------------------------------


def root_exempt(plan: CapturePlan) -> Iterator[LintWarning]:
    """Uid 0 or gid 0 is exempt."""
    exclude = plan.outbound.owners.exclude
    places: list[tuple[str, Iterable[tuple[int, int]]]] = [
        ("proxy.uids", [(uid, uid) for uid in plan.proxy.uids]),
        ("proxy.gids", [(gid, gid) for gid in plan.proxy.gids]),
        ("outbound.owners.exclude.uids", exclude.uids),
        ("outbound.owners.exclude.gids", exclude.gids),
    ]
    for path, ids in places:
        if any(first == 0 for first, _ in ids):
            yield LintWarning(path, "whatever runs as root bypasses the proxy", "run the proxy under an id of its own")


def proxy_captured(plan: CapturePlan) -> Iterator[LintWarning]:
    """The proxy's ids are among those whose traffic is to be captured."""
    include = plan.outbound.owners.include
    if not isinstance(include, Owners):
        return
    for kind, ids, ranges in (("uids", plan.proxy.uids, include.uids), ("gids", plan.proxy.gids, include.gids)):
        listed = Spans(ranges)
        for each in ids:
            if listed.cover(each, each):
                message = f"{each} is the proxy's, whose traffic is never captured"
                yield LintWarning(f"outbound.owners.include.{kind}", message, "leave it out")


def nobody_captured(plan: CapturePlan) -> Iterator[LintWarning]:
    """The owners whose traffic is to be captured are none."""
    if plan.outbound.owners.include == Owners():
        message = "nobody's outbound traffic is captured"
        yield LintWarning("outbound.owners.include", message, 'name an owner, or write "*"')


def exceptions_without_effect(plan: CapturePlan) -> Iterator[LintWarning]:
    """Owners with an exception are exempt altogether."""
    exclude, proxy = plan.outbound.owners.exclude, plan.proxy
    uids = Spans((*exclude.uids, *(IdRange(uid, uid) for uid in proxy.uids)))
    gids = Spans((*exclude.gids, *(IdRange(gid, gid) for gid in proxy.gids)))
    for index, exception in enumerate(plan.outbound.exclude_for_owners):
        owners = exception.owners
        exempt = all(uids.cover(*each) for each in owners.uids) and all(gids.cover(*each) for each in owners.gids)
        if exempt and set(owners.cgroups) <= set(exclude.cgroups):
            path = f"outbound.exclude_for_owners[{index}]"
            yield LintWarning(path, "it never decides: these owners are exempt altogether", "leave it out")


def self_calls_of_nobody(plan: CapturePlan) -> Iterator[LintWarning]:
    """Self-calls are those of a proxy that has neither uids nor gids nor a mark."""
    proxy = plan.proxy
    if proxy.self_calls == "proxy" and not (proxy.uids or proxy.gids or proxy.mark):
        message = "no call is the proxy's, as it has neither uids, gids nor a mark"
        yield LintWarning("proxy.self_calls", message, "write none, or say what the proxy runs as")


def cgroups_absent(plan: CapturePlan) -> Iterator[LintWarning]:
    """A cgroup does not exist, at least here."""
    rules = plan.outbound.owners
    places: list[tuple[str, object]] = [
        ("proxy.self_calls", plan.proxy.self_calls),
        ("outbound.owners.include", rules.include),
        ("outbound.owners.exclude", rules.exclude),
        *(
            (f"outbound.exclude_for_owners[{i}]", each.owners)
            for i, each in enumerate(plan.outbound.exclude_for_owners)
        ),
    ]
    for path, owners in places:
        for cgroup in owners.cgroups if isinstance(owners, Owners) else ():
            if not cgroup.id:
                message = f"there is no cgroup {cgroup.path} here, and the kernel refuses rules for absent ones"
                yield LintWarning(f"{path}.cgroups", message, "create it before apply, or add cgroups to prefer")


# --- ports ---------------------------------------------------------------------------------------------------


def one_port_for_both(plan: CapturePlan) -> Iterator[LintWarning]:
    """Inbound and outbound connections go to the same port."""
    port, mode = plan.proxy.inbound_port, plan.inbound.mode
    if port == plan.proxy.outbound_port and mode != "none":
        message = f"{port} is proxy.outbound_port too: one listener gets both directions, and has to tell them apart"
        yield LintWarning("proxy.inbound_port", message, "give each a port of its own")


# --- loops ---------------------------------------------------------------------------------------------------


def dns_loop(plan: CapturePlan) -> Iterator[LintWarning]:
    """DNS is captured, and the proxy's own queries are told by a mark alone."""
    proxy = plan.proxy
    if plan.dns.capture != "none" and not proxy.uids and not proxy.gids:
        message = "the proxy's own queries come back to it, unless its resolver sets proxy.mark on every one"
        yield LintWarning("dns.capture", message, "give proxy.uids or proxy.gids")


def dns_server_on_loopback(plan: CapturePlan) -> Iterator[LintWarning]:
    """A captured server is a stub on this host, which may ask the proxy in turn."""
    if plan.dns.capture != "servers":
        return
    for server in plan.dns.servers:
        if _LOOPBACK.touch(*span_of(server)):
            message = f"{write_cidr(server)} is a server on this host; what it asks upstream may come back to the proxy"
            yield LintWarning("dns.servers", message, "list the upstream servers, or exempt the stub's user")


def dns_to_captured_server(plan: CapturePlan) -> Iterator[LintWarning]:
    """DNS goes to an address whose own queries would be captured too."""
    servers = Spans.of_blocks(_ALL.values() if plan.dns.capture == "all" else plan.dns.servers)
    for address in plan.dns.addresses if plan.dns.capture != "none" else ():
        local = _LOOPBACK.touch(*_span_of_address(address))
        if servers.touch(*_span_of_address(address)) and (local or plan.dns.capture == "servers"):
            message = f"{write_address(address)} answers, and is itself a captured destination"
            yield LintWarning("dns.addresses", message, "make sure that it never asks itself, or use dns.port alone")


def proxy_port_captured(plan: CapturePlan) -> Iterator[LintWarning]:
    """A port of the proxy's own is listed as one to capture."""
    proxy, include = plan.proxy, plan.inbound.ports.include
    inbound = Spans(() if include == "*" or plan.inbound.mode == "none" else include)
    outbound = Spans(plan.outbound.ports.include)
    ports = [("outbound_port", proxy.outbound_port), ("inbound_port", proxy.inbound_port)]
    for name, port in ports:
        for path, spans in (("inbound.ports.include", inbound), ("outbound.ports.include", outbound)):
            if spans.cover(port, port):
                message = f"{port} is proxy.{name}: connections to the proxy itself are sent to it again"
                yield LintWarning(path, message, "leave it out")


def marks_overlap(plan: CapturePlan) -> Iterator[LintWarning]:
    """A packet may carry the proxy's mark and the TPROXY mark at once, or one overwrites the other."""
    ours, proxy = plan.inbound.tproxy.mark, plan.proxy.mark
    if plan.inbound.mode == "tproxy" and proxy is not None and ours.mask & proxy.mask:
        message = f"{write_mark(ours)} shares bits with proxy.mark {write_mark(proxy)}: setting one changes the other"
        yield LintWarning("inbound.tproxy.mark", message, "give the two marks masks that do not overlap")


def loopback_captured(plan: CapturePlan) -> Iterator[LintWarning]:
    """What applications send over lo is captured."""
    if plan.outbound.loopback == "capture":
        message = "calls of a process to itself and to its neighbours over lo go to the proxy"
        yield LintWarning("outbound.loopback", message, "write bypass, unless the proxy is made for that")


def loopback_without_family(plan: CapturePlan) -> Iterator[LintWarning]:
    """A captured family has no loopback block."""
    present = {cidr.family for cidr in plan.proxy.loopback}
    for family in FAMILIES:
        if family not in present and (family == "ip" or plan.ipv6 == "capture"):
            address = "127.0.0.1" if family == "ip" else "::1"
            message = f"calls to {address} count as calls to the namespace's own address"
            yield LintWarning("proxy.loopback", message, f"add {address}")


# --- dns -----------------------------------------------------------------------------------------------------


def dns_port_excluded(plan: CapturePlan) -> Iterator[LintWarning]:
    """DNS is captured, and port 53 is excluded before that."""
    if plan.dns.capture != "none" and Spans(plan.outbound.ports.exclude).cover(DNS_PORT, DNS_PORT):
        message = "port 53 is excluded before DNS capture is considered: no query is captured"
        yield LintWarning("outbound.ports.exclude", message, "leave 53 out, or write dns.capture: none")


def dns_unused(plan: CapturePlan) -> Iterator[LintWarning]:
    """Servers or addresses are given, and nothing looks at them."""
    dns = plan.dns
    if dns.servers and dns.capture != "servers":
        yield LintWarning("dns.servers", f"not used with dns.capture: {dns.capture}", "write capture: servers")
    if dns.addresses and dns.capture == "none":
        yield LintWarning("dns.addresses", "not used with dns.capture: none", "write capture: servers or all")


def dns_family_uncaptured(plan: CapturePlan) -> Iterator[LintWarning]:
    """DNS goes to an address of one family, so that the other's queries are not captured."""
    given = {len(address) for address in plan.dns.addresses}
    if plan.dns.capture == "none" or len(given) != 1 or plan.ipv6 != "capture":
        return
    other = "IPv4" if given == {16} else "IPv6"
    message = f"queries to {other} servers are not captured, as no address of that family is given"
    yield LintWarning("dns.addresses", message, f"give an {other} address too")


def dns_without_zones(plan: CapturePlan) -> Iterator[LintWarning]:
    """DNS is redirected without conntrack zones."""
    if plan.dns.capture != "none" and not plan.dns.zones and not plan.dns.addresses:
        message = "a query of a client and one of the proxy from the same port share a conntrack entry, and one is lost"
        yield LintWarning("dns.zones", message, "write zones: true")


# --- entries that never match --------------------------------------------------------------------------------


def inbound_ports_never_match(plan: CapturePlan) -> Iterator[LintWarning]:
    """Inbound excludes outside of what is included, or of the tunnel port."""
    ports, tunnel = plan.inbound.ports, plan.proxy.tunnel_port
    included = Spans([(1, 65535)] if ports.include == "*" else ports.include)
    for entry in ports.exclude:
        if not included.touch(*entry):
            message = f"{write_range(entry)} is not among the ports that are captured"
            yield LintWarning("inbound.ports.exclude", message, "leave it out")
        elif entry == (tunnel, tunnel):
            message = f"{tunnel} is proxy.tunnel_port, which is never captured"
            yield LintWarning("inbound.ports.exclude", message, "leave it out")
    if tunnel is not None and ports.include != "*" and included.cover(tunnel, tunnel):
        message = f"{tunnel} is proxy.tunnel_port, which is never captured"
        yield LintWarning("inbound.ports.include", message, "leave it out, or write proxy.tunnel_port: none")


def inbound_unused(plan: CapturePlan) -> Iterator[LintWarning]:
    """Nothing inbound is captured, and settings say how."""
    inbound = plan.inbound
    settings: list[tuple[str, object]] = [
        ("inbound.ports.exclude", inbound.ports.exclude),
        ("inbound.sources.exclude", inbound.sources.exclude),
    ]
    if inbound.mode == "none":
        settings.append(("inbound.ports.include", inbound.ports.include != "*" and inbound.ports.include))
        for path, value in settings:
            if value:
                yield LintWarning(path, "not used with inbound.mode: none", "leave it out")
    elif not inbound.ports.include:
        yield LintWarning("inbound.ports.include", "no inbound connection is captured", "write inbound.mode: none")
    else:
        excluded = Spans.of_blocks(inbound.sources.exclude)
        for family in FAMILIES:
            if excluded.cover(*span_of(_ALL[family])):
                message = f"every {_word(family)} source is excluded: nothing of it is captured inbound"
                yield LintWarning("inbound.sources.exclude", message, "exclude less, or write inbound.mode: none")


def outbound_cidrs_never_match(plan: CapturePlan) -> Iterator[LintWarning]:
    """Includes that lie in an exclude, and excludes outside of every include."""
    cidrs = plan.outbound.cidrs
    excluded = Spans.of_blocks(cidrs.exclude)
    included = Spans.of_blocks(_ALL.values() if cidrs.include == "*" else cidrs.include)
    for family in FAMILIES if cidrs.include == "*" else ():
        if excluded.cover(*span_of(_ALL[family])):
            message = f"every {_word(family)} destination is excluded: nothing of it is captured"
            yield LintWarning("outbound.cidrs.exclude", message, "exclude less, or list what to include")
    for cidr in cidrs.include if cidrs.include != "*" else ():
        if excluded.cover(*span_of(cidr)):
            message = f"{write_cidr(cidr)} lies in outbound.cidrs.exclude, which wins: it is never captured"
            yield LintWarning("outbound.cidrs.include", message, "leave it out of one of the two")
    needed = bool(plan.outbound.ports.include) or any(each.exclude is None for each in plan.interfaces.reroute)
    for cidr in () if needed else cidrs.exclude:
        if not included.touch(*span_of(cidr)):
            message = f"{write_cidr(cidr)} is not among the destinations that are captured"
            yield LintWarning("outbound.cidrs.exclude", message, "leave it out")


def outbound_ports_never_match(plan: CapturePlan) -> Iterator[LintWarning]:
    """Port lists that change nothing."""
    ports, cidrs = plan.outbound.ports, plan.outbound.cidrs
    if ports.include and cidrs.include == "*":
        message = "every destination is captured already, by outbound.cidrs.include"
        yield LintWarning("outbound.ports.include", message, "leave it out, or list the blocks in cidrs.include")
    if cidrs.include:
        return
    captured = Spans((*ports.include, *([(DNS_PORT, DNS_PORT)] if plan.dns.capture != "none" else [])))
    for entry in ports.exclude:
        if not captured.touch(*entry):
            message = f"{write_range(entry)} is not among the ports that are captured"
            yield LintWarning("outbound.ports.exclude", message, "leave it out")


def ip6_bypasses(plan: CapturePlan) -> Iterator[LintWarning]:
    """IPv6 is left alone, and what is said of it has no effect."""
    if plan.ipv6 != "skip":
        return
    yield LintWarning("ipv6", "all IPv6 traffic bypasses the proxy", "write capture, or block")
    cidrs = plan.outbound.cidrs
    places = [
        ("outbound.cidrs.include", cidrs.include if cidrs.include != "*" else ()),
        ("outbound.cidrs.exclude", cidrs.exclude),
        ("inbound.sources.exclude", plan.inbound.sources.exclude),
        ("proxy.probe_sources", plan.proxy.probe_sources),
        ("dns.servers", plan.dns.servers),
    ]
    for path, blocks in places:
        if any(cidr.family == "ip6" for cidr in blocks):
            yield LintWarning(path, "its IPv6 entries have no effect with ipv6: skip", "leave them out")
    if plan.dns.capture == "servers" and {cidr.family for cidr in plan.dns.servers} == {"ip6"}:
        message = "no query is captured: every server is of IPv6, which bypasses the proxy"
        yield LintWarning("dns.servers", message, "list IPv4 servers too")


def wide_interfaces(plan: CapturePlan) -> Iterator[LintWarning]:
    """A wildcard for every interface, or lo excluded."""
    names = [(f"interfaces.exclude[{index}]", name) for index, name in enumerate(plan.interfaces.exclude)]
    rerouted = enumerate(plan.interfaces.reroute)
    names += [(f"interfaces.reroute[{index}].interface", reroute.interface) for index, reroute in rerouted]
    for path, name in names:
        if name == "+":
            yield LintWarning(path, "it means every interface, lo included", "name a prefix, such as br+")
        elif name in ("lo", "l+", "lo+"):
            message = "calls of the namespace to itself, and DNS to a local stub, are not looked at"
            yield LintWarning(path, message, "leave lo to outbound.loopback")


def rerouted_and_excluded(plan: CapturePlan) -> Iterator[LintWarning]:
    """An interface is left alone, and treated as outbound."""
    for index, reroute in enumerate(plan.interfaces.reroute):
        for pattern in plan.interfaces.exclude:
            name = reroute.interface
            if pattern == name or (pattern.endswith("+") and name.startswith(pattern[:-1])):
                message = f"interfaces.exclude has {pattern}: what leaves by it is left alone, what enters is captured"
                yield LintWarning(f"interfaces.reroute[{index}].interface", message, "leave it out of one of the two")


def _word(family: Family) -> str:
    return "IPv4" if family == "ip" else "IPv6"


def _span_of_address(packed: bytes) -> tuple[int, int]:
    return span_of(Cidr(packed, len(packed) * 8))


RULES: tuple[Callable[[CapturePlan], Iterator[LintWarning]], ...] = (
    root_exempt,
    proxy_captured,
    nobody_captured,
    exceptions_without_effect,
    self_calls_of_nobody,
    cgroups_absent,
    one_port_for_both,
    dns_loop,
    dns_server_on_loopback,
    dns_to_captured_server,
    proxy_port_captured,
    marks_overlap,
    loopback_captured,
    loopback_without_family,
    dns_port_excluded,
    dns_unused,
    dns_family_uncaptured,
    dns_without_zones,
    inbound_ports_never_match,
    inbound_unused,
    outbound_cidrs_never_match,
    outbound_ports_never_match,
    ip6_bypasses,
    wide_interfaces,
    rerouted_and_excluded,
)


def lint(plan: CapturePlan, redundant: Iterable[Redundant] = ()) -> tuple[LintWarning, ...]:
    """Every doubt about a plan, in the order of `RULES`; then `redundant` entries of its file (`examine_plan`)."""
    found = [warning for rule in RULES for warning in rule(plan_of(plan, "ip"))]
    if plan.for_ipv6 is not None:
        again = [warning for rule in RULES for warning in rule(plan_of(plan, "ip6"))]
        found += [each._replace(path=f"for_ipv6.{each.path}") for each in again if each not in found]
    for entry in redundant:
        message = f"{entry.value} changes nothing: other entries of the list say the same"
        found.append(LintWarning(entry.path, message, "leave it out"))
    return tuple(found)
