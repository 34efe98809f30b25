"""The specification in a page: what a plan wants to happen to a flow.

It knows nothing of rules. The compiler's rules, walked by `netapply.evaluate`, and real packets must agree with it;
the tests hold the three against one another.
"""

from __future__ import annotations

from collections.abc import Iterable

from netapply.flow import TCP, UDP, Decision, Flow
from netapply.plan import CapturePlan, Everything, OwnerException, Owners, path_of, plan_of
from netapply.ruleset import Cidr, PortRange

DNS_PORT = 53
ZONE_DIRECT, ZONE_CAPTURED = 1, 2


def decide(plan: CapturePlan, flow: Flow) -> Decision:
    """What becomes of the first packet of `flow` in a namespace that holds `plan`.

    Only new connections are captured: a flow that existed before stays as it was, whether connection tracking knows
    it or has picked it up in its middle. A packet over `lo` is an outbound flow; its second sight, inbound, is never
    decided again.
    """
    decision = _decide(plan_of(plan, flow.family), flow)
    return decision._replace(path=path_of(plan, flow.family, decision.path))


def _decide(plan: CapturePlan, flow: Flow) -> Decision:
    """Of a plan that both families share."""
    if flow.family == "ip6" and plan.ipv6 == "skip":
        return Decision("bypass", path="ipv6")
    decision = _outbound(plan, flow) if flow.direction == "outbound" else _entering(plan, flow)
    blocked = flow.family == "ip6" and plan.ipv6 == "block"
    zone = 0 if blocked else _zone(plan, flow, captured=decision.path.startswith("dns"))
    if flow.state == "invalid" and flow.direction == "inbound" and plan.invalid != "keep":
        excluded = plan.invalid == "drop" and _named(flow.iface, plan.interfaces.exclude)
        return Decision(
            "bypass" if excluded else "drop", zone=zone, path="interfaces.exclude" if excluded else "invalid"
        )
    if flow.state != "new":
        return Decision("bypass", zone=zone, path=decision.path)
    if blocked and decision.verdict != "bypass":
        return Decision("drop", path="ipv6")
    return decision._replace(zone=zone)


def _outbound(plan: CapturePlan, flow: Flow) -> Decision:
    proxy, outbound = plan.proxy, plan.outbound
    tcp, lo = flow.protocol == TCP, flow.iface == "lo"
    query = plan.dns.capture != "none" and flow.protocol in (TCP, UDP) and flow.dport == DNS_PORT
    if _named(flow.iface, plan.interfaces.exclude):
        return Decision("bypass", path="interfaces.exclude")
    if query and flow.protocol == UDP and plan.dns.udp_exempt == "proxy":
        return _query_over_udp(plan, flow)
    if flow.protocol in (TCP, UDP) and _port(flow.dport, outbound.ports.exclude):
        return Decision("bypass", path="outbound.ports.exclude")
    if any(_excepted(flow, exception) for exception in outbound.exclude_for_owners):
        return Decision("bypass", path="outbound.exclude_for_owners")
    if lo and _address(flow.source, proxy.passthrough_sources):
        return Decision("bypass", path="proxy.passthrough_sources")
    if _tproxied(plan, flow):
        return Decision("bypass", path="inbound.tproxy.mark")
    if _address(flow.destination, proxy.probe_sources):
        return Decision("bypass", path="proxy.probe_sources")
    own_address = lo and tcp and not _address(flow.destination, proxy.loopback)
    tunnel = flow.dport == proxy.tunnel_port and "self-calls" in proxy.tunnel_exempt
    if own_address and not tunnel and not query and _self_caller(plan, flow):
        return Decision("redirect", proxy.inbound_port, path="proxy.self_calls")
    if own_address and query and _self_query(plan, flow):
        return Decision("redirect", proxy.inbound_port, path="dns.self_calls")
    if _own(plan, flow):
        return Decision("bypass", path="proxy")
    if lo and not query and outbound.loopback == "bypass":
        return Decision("bypass", path="outbound.loopback")
    if _owned(flow, outbound.owners.exclude):
        return Decision("bypass", path="outbound.owners.exclude")
    if outbound.owners.include != "*" and not _owned(flow, outbound.owners.include):
        return Decision("bypass", path="outbound.owners.include")
    if query and (answer := _dns(plan, flow)):
        return answer
    if not tcp:
        return Decision("bypass", path="outbound")
    if _address(flow.destination, proxy.loopback):
        return Decision("bypass", path="proxy.loopback")
    if _address(flow.destination, outbound.cidrs.exclude):
        return Decision("bypass", path="outbound.cidrs.exclude")
    if _port(flow.dport, outbound.ports.include):
        return Decision("redirect", proxy.outbound_port, path="outbound.ports.include")
    if _address(flow.destination, outbound.cidrs.include):
        return Decision("redirect", proxy.outbound_port, path="outbound.cidrs.include")
    return Decision("bypass", path="outbound.cidrs.include")


def _entering(plan: CapturePlan, flow: Flow) -> Decision:
    """Inbound, once more without rerouting where TPROXY comes before that."""
    if plan.inbound.mode == "tproxy" and plan.inbound.tproxy.before_reroute:
        captured = _inbound(plan._replace(interfaces=plan.interfaces._replace(reroute=())), flow)
        if captured.verdict != "bypass" or _tproxied(plan, flow):
            return captured
    return _inbound(plan, flow)


def _inbound(plan: CapturePlan, flow: Flow) -> Decision:
    proxy, inbound, tcp = plan.proxy, plan.inbound, flow.protocol == TCP
    for index, reroute in enumerate(plan.interfaces.reroute):
        if _named(flow.iface, (reroute.interface,)):
            include = plan.outbound.cidrs.include if reroute.include is None else reroute.include
            exclude = plan.outbound.cidrs.exclude if reroute.exclude is None else reroute.exclude
            taken = tcp and _address(flow.destination, include) and not _address(flow.destination, exclude)
            path = f"interfaces.reroute[{index}]"
            return Decision("redirect", proxy.outbound_port, path=path) if taken else Decision("bypass", path=path)
    if _named(flow.iface, plan.interfaces.exclude):
        return Decision("bypass", path="interfaces.exclude")
    if inbound.mode == "none" or not tcp or flow.iface == "lo":
        return Decision("bypass", path="inbound.mode")
    if _tproxied(plan, flow):
        return Decision("bypass", path="inbound.tproxy.mark")
    if _address(flow.source, proxy.probe_sources):
        return Decision("bypass", path="proxy.probe_sources")
    if _address(flow.source, inbound.sources.exclude):
        return Decision("bypass", path="inbound.sources.exclude")
    if _address(flow.destination, inbound.destinations.exclude):
        return Decision("bypass", path="inbound.destinations.exclude")
    if flow.dport == proxy.tunnel_port and "inbound" in proxy.tunnel_exempt:
        return Decision("bypass", path="proxy.tunnel_port")
    if _port(flow.dport, inbound.ports.exclude):
        return Decision("bypass", path="inbound.ports.exclude")
    if not _port(flow.dport, inbound.ports.include):
        return Decision("bypass", path="inbound.ports.include")
    port = inbound.tproxy.port if inbound.mode == "tproxy" else None
    return Decision(inbound.mode, port or proxy.inbound_port, path="inbound.ports.include")


def _query_over_udp(plan: CapturePlan, flow: Flow) -> Decision:
    """Where nothing but being the proxy's own exempts a query over UDP."""
    if _own(plan, flow):
        return Decision("bypass", path="proxy")
    return _dns(plan, flow) or Decision("bypass", path="outbound")


def _dns(plan: CapturePlan, flow: Flow) -> Decision | None:
    dns = plan.dns
    if dns.capture == "servers" and not _address(flow.destination, dns.servers):
        return None
    path = "dns.servers" if dns.capture == "servers" else "dns.capture"
    if not dns.addresses:
        return Decision("redirect", dns.port, path=path)
    same_family = [address for address in dns.addresses if len(address) == len(flow.destination)]
    return Decision("dnat", dns.port, same_family[0], path=path) if same_family else None


def _zone(plan: CapturePlan, flow: Flow, *, captured: bool) -> int:
    """The conntrack zone of a DNS packet: the client's queries apart from direct ones to the same server."""
    dns = plan.dns
    if dns.capture == "none" or not dns.zones or dns.addresses or flow.protocol != UDP:
        return 0
    servers: Everything | tuple[Cidr, ...] = "*" if dns.capture == "all" else dns.servers
    if _named(flow.iface, plan.interfaces.exclude):
        return 0
    if flow.direction == "inbound":
        return ZONE_DIRECT if flow.sport == DNS_PORT and _address(flow.source, servers) else 0
    if flow.sport == dns.port and _own(plan, flow):
        return ZONE_CAPTURED
    if flow.dport == DNS_PORT and _address(flow.destination, servers):
        return ZONE_CAPTURED if captured else ZONE_DIRECT
    local_server = flow.iface == "lo" and flow.sport == DNS_PORT and _address(flow.source, servers)
    return ZONE_DIRECT if local_server else 0


def _tproxied(plan: CapturePlan, flow: Flow) -> bool:
    """Is this the proxy's connection to the application, on behalf of one that came by TPROXY?"""
    mark = plan.inbound.tproxy.mark
    return plan.inbound.mode == "tproxy" and flow.mark & mark.mask == mark.value


def _own(plan: CapturePlan, flow: Flow) -> bool:
    """Is this the proxy's own packet?"""
    proxy = plan.proxy
    marked = proxy.mark is not None and flow.mark & proxy.mark.mask == proxy.mark.value
    return flow.uid in proxy.uids or flow.gid in proxy.gids or marked


def _self_caller(plan: CapturePlan, flow: Flow) -> bool:
    callers = plan.proxy.self_calls
    if callers == "everyone":
        return True
    if callers == "none":
        return False
    return _own(plan, flow) if callers == "proxy" else _owned(flow, callers)


def _self_query(plan: CapturePlan, flow: Flow) -> bool:
    return flow.uid not in plan.proxy.uids and _owned(flow, plan.dns.self_calls)


def _excepted(flow: Flow, exception: OwnerException) -> bool:
    protocol = {"tcp": TCP, "udp": UDP}[exception.protocol]
    return flow.protocol == protocol and _port(flow.dport, exception.ports) and _owned(flow, exception.owners)


def _owned(flow: Flow, owners: Owners) -> bool:
    in_cgroup = any(f"{flow.cgroup}/".startswith(f"{cgroup.path}/") for cgroup in owners.cgroups)
    by_uid = any(first <= flow.uid <= last for first, last in owners.uids)
    return by_uid or any(first <= flow.gid <= last for first, last in owners.gids) or in_cgroup


def _port(port: int, ranges: Everything | tuple[PortRange, ...]) -> bool:
    return ranges == "*" or any(first <= port <= last for first, last in ranges)


def _address(packed: bytes, blocks: Everything | Iterable[Cidr]) -> bool:
    if isinstance(blocks, str):
        return True
    bits = len(packed) * 8
    number = int.from_bytes(packed)
    return any(
        len(block.packed) == len(packed) and (number ^ int.from_bytes(block.packed)) >> (bits - block.prefix) == 0
        for block in blocks
    )


def _named(iface: str, patterns: Iterable[str]) -> bool:
    return any(iface.startswith(name[:-1]) if name.endswith("+") else iface == name for name in patterns)
