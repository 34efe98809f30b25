"""Plans whose fields are right one by one and impossible together. Pure.

Each contradiction is a small function from the plan to faults, listed with the paths that it looks at: where one of
those has a fault of its own already, the contradiction is not looked for. Doubtful but possible plans are lint's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netapply.errors import Fault
from netapply.fields import shorten
from netapply.plan import Owners, plan_of
from netapply.spans import Spans
from netapply.spelling import write_address, write_mark, write_range
from netapply.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from netapply.plan import CapturePlan, Everything, IdRange
    from netapply.ruleset import Cidr, PortRange


def _root_exempt(plan: CapturePlan) -> Iterator[Fault]:
    for path, ids in (("proxy.uids", plan.proxy.uids), ("proxy.gids", plan.proxy.gids)):
        if 0 in ids and not plan.proxy.allow_root:
            yield Fault(path, "0", "root is never exempt, unless proxy.allow_root is true")


def _no_exemption(plan: CapturePlan) -> Iterator[Fault]:
    proxy, outbound = plan.proxy, plan.outbound
    exempt = proxy.uids or proxy.gids or proxy.mark or any(outbound.owners.exclude)
    captured = outbound.cidrs.include or outbound.ports.include or plan.dns.capture != "none"
    if captured and not exempt and outbound.owners.include == "*":
        yield Fault("proxy.uids", "an empty list", "the proxy's own traffic would loop: give its uids, gids or mark")


def _ports_of_proxy(plan: CapturePlan) -> Iterator[Fault]:
    proxy = plan.proxy
    # Both directions may have one port, as Istio 1.4 has it; lint doubts that.
    used = {proxy.outbound_port: "proxy.outbound_port"}
    used.setdefault(proxy.inbound_port, "proxy.inbound_port")
    others: list[tuple[str, int | None]] = [("proxy.tunnel_port", proxy.tunnel_port)]
    if plan.dns.capture != "none" and not plan.dns.addresses:
        others.append(("dns.port", plan.dns.port))
    for path, port in others:
        if port is not None and used.setdefault(port, path) != path:
            yield Fault(path, str(port), f"{used[port]} has that port: each listener needs its own")


def _inbound_ports(plan: CapturePlan) -> Iterator[Fault]:
    ports = plan.inbound.ports
    if ports.include != "*":
        yield from _excluded_again("inbound.ports", ports.include, ports.exclude)


def _outbound_ports(plan: CapturePlan) -> Iterator[Fault]:
    ports = plan.outbound.ports
    yield from _excluded_again("outbound.ports", ports.include, ports.exclude)


def _owners_twice(plan: CapturePlan) -> Iterator[Fault]:
    include, exclude = plan.outbound.owners.include, plan.outbound.owners.exclude
    if not isinstance(include, Owners):
        return
    yield from _excluded_again("outbound.owners", include.uids, exclude.uids, ".uids")
    yield from _excluded_again("outbound.owners", include.gids, exclude.gids, ".gids")
    for cgroup in include.cgroups:
        if any(f"{cgroup.path}/".startswith(f"{other.path}/") for other in exclude.cgroups):
            yield Fault("outbound.owners.include.cgroups", shorten(cgroup.path), "outbound.owners.exclude has it too")


def _excluded_again(
    at: str, include: Iterable[PortRange | IdRange], exclude: Iterable[PortRange | IdRange], tail: str = ""
) -> Iterator[Fault]:
    # A part of a range may be excluded from it; an entry of which nothing is left was a mistake.
    excluded = Spans(exclude)
    for entry in include:
        if excluded.cover(*entry):
            yield Fault(f"{at}.include{tail}", str(write_range(entry)), f"{at}.exclude{tail} has it too: drop one")


def _nobody(plan: CapturePlan) -> Iterator[Fault]:
    places: list[tuple[str, object]] = [
        ("proxy.self_calls", plan.proxy.self_calls),
        *(
            (f"outbound.exclude_for_owners[{i}]", each.owners)
            for i, each in enumerate(plan.outbound.exclude_for_owners)
        ),
    ]
    for path, owners in places:
        if owners == Owners():
            yield Fault(path, "nobody", "name at least one uid, gid or cgroup")


def _exceptions_without_ports(plan: CapturePlan) -> Iterator[Fault]:
    for index, exception in enumerate(plan.outbound.exclude_for_owners):
        if not exception.ports:
            yield Fault(f"outbound.exclude_for_owners[{index}].ports", "an empty list", 'list ports, or write "*"')


def _interfaces(plan: CapturePlan) -> Iterator[Fault]:
    seen: set[str] = set()
    for index, reroute in enumerate(plan.interfaces.reroute):
        path, name = f"interfaces.reroute[{index}].interface", reroute.interface
        if name == "lo":
            yield Fault(path, "'lo'", "the loopback interface cannot be rerouted")
        if name in seen:
            yield Fault(path, shorten(name), "name each interface once, with all its blocks")
        seen.add(name)


def _dns_servers(plan: CapturePlan) -> Iterator[Fault]:
    dns = plan.dns
    if dns.capture != "servers":
        return
    if not dns.servers and dns.udp_exempt == "outbound":  # Istio 1.11 writes its exemptions without a server, too
        yield Fault("dns.servers", "an empty list", 'list the servers, or write capture: "all" for any server')


def _dns_addresses(plan: CapturePlan) -> Iterator[Fault]:
    addresses = plan.dns.addresses
    for index, address in enumerate(addresses):
        if any(len(address) == len(other) for other in addresses[:index]):
            yield Fault("dns.addresses", shorten(write_address(address)), "give at most one address a family")
    if addresses and plan.ipv6 == "skip" and not any(len(address) == 4 for address in addresses):
        yield Fault("dns.addresses", "IPv6 alone", "with ipv6: skip, give an IPv4 address")


def _only_ip6_captured(plan: CapturePlan) -> Iterator[Fault]:
    if plan.ipv6 != "skip":
        return
    places: list[tuple[str, Everything | tuple[Cidr, ...] | None]] = [
        ("outbound.cidrs.include", plan.outbound.cidrs.include),
        *((f"interfaces.reroute[{i}].include", each.include) for i, each in enumerate(plan.interfaces.reroute)),
    ]
    for path, blocks in places:
        if blocks is not None and blocks != "*" and _only_ip6(blocks):
            yield Fault(path, "IPv6 alone", "with ipv6: skip, nothing would be captured: list IPv4 blocks too")


def _only_ip6(blocks: Iterable[Cidr]) -> bool:
    families = {cidr.family for cidr in blocks}
    return families == {"ip6"}


def _same_marks(plan: CapturePlan) -> Iterator[Fault]:
    mark = plan.proxy.mark
    if plan.inbound.mode == "tproxy" and mark is not None and mark == plan.inbound.tproxy.mark:
        yield Fault("inbound.tproxy.mark", write_mark(mark), "proxy.mark is the same: packets need two different marks")


class Contradiction(NamedTuple):
    """A fault between fields: the plan paths at which it looks, and how it is found."""

    paths: tuple[str, ...]
    find: Callable[[CapturePlan], Iterator[Fault]]


CONTRADICTIONS = (
    Contradiction(("proxy.uids", "proxy.gids", "proxy.allow_root"), _root_exempt),
    Contradiction(("proxy.uids", "proxy.gids", "proxy.mark", "outbound", "dns.capture"), _no_exemption),
    Contradiction(
        ("proxy.outbound_port", "proxy.inbound_port", "proxy.tunnel_port", "dns.port", "dns.capture", "dns.addresses"),
        _ports_of_proxy,
    ),
    Contradiction(("inbound.ports",), _inbound_ports),
    Contradiction(("outbound.ports",), _outbound_ports),
    Contradiction(("outbound.owners",), _owners_twice),
    Contradiction(("proxy.self_calls", "outbound.exclude_for_owners"), _nobody),
    Contradiction(("outbound.exclude_for_owners",), _exceptions_without_ports),
    Contradiction(("interfaces.reroute",), _interfaces),
    Contradiction(("dns.capture", "dns.servers"), _dns_servers),
    Contradiction(("dns.addresses", "ipv6"), _dns_addresses),
    Contradiction(("outbound.cidrs.include", "interfaces.reroute", "ipv6"), _only_ip6_captured),
    Contradiction(("proxy.mark", "inbound.tproxy", "inbound.mode"), _same_marks),
)


def find_contradictions(plan: CapturePlan, faulty: Iterable[str] = ()) -> Iterator[Fault]:
    """Every fault between fields, but for those that look at a path with a fault of its own (`faulty`)."""
    known = tuple(faulty)
    standing = [each for each in CONTRADICTIONS if not any(_related(p, bad) for p in each.paths for bad in known)]
    found = [fault for each in standing for fault in each.find(plan_of(plan, "ip"))]
    yield from found
    if plan.for_ipv6 is None or any(_related("for_ipv6", bad) for bad in known):
        return
    for each in standing:
        for fault in each.find(plan_of(plan, "ip6")):
            if fault not in found:
                yield fault._replace(path=f"for_ipv6.{fault.path}")


def _related(path: str, faulty: str) -> bool:
    # Either may be the group of the other; brackets and dots end a name.
    short, long = sorted((path, faulty), key=len)
    return long.startswith(short) and long[len(short) : len(short) + 1] in ("", ".", "[", "(")
