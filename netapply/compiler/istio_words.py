"""What a version of Istio's rules can say. A plan that asks for more is refused, never compiled to something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

from netapply.errors import UnsupportedError
from netapply.plan import CapturePlan, Owners

Name: TypeAlias = Literal["istio", "istio-1.11", "istio-1.4"]


def refuse(plan: CapturePlan, name: Name, *, tproxy: bool) -> None:
    """UnsupportedError that names every field to which the layout has no rule. `tproxy`: in one of the families."""
    faults = [*_everywhere(plan), *_of_version(plan, name)]
    if plan.interfaces.exclude and plan.invalid == ("drop-all" if tproxy else "drop"):
        faults.append("invalid")
    if faults:
        raise UnsupportedError(
            f"layout {name} cannot say {', '.join(faults)} as this plan has it",
            next_step="import the plan from Istio's settings for that version, or use layout netapply",
        )


def _everywhere(plan: CapturePlan) -> Iterator[str]:
    proxy, inbound, outbound, dns = plan.proxy, plan.inbound, plan.outbound, plan.dns
    tproxy = inbound.mode == "tproxy"
    owners = outbound.owners
    listed = () if isinstance(owners.include, str) else (*owners.include.uids, *owners.include.cgroups)
    unsaid = {
        "proxy.mark": proxy.mark,
        "proxy.probe_sources": proxy.probe_sources,
        "inbound.mode": inbound.mode == "none",
        "inbound.sources": inbound.sources.exclude,
        "inbound.destinations": inbound.destinations.exclude != (proxy.loopback if tproxy else ()),
        "inbound.ports.exclude": inbound.ports.include != "*" and inbound.ports.exclude,
        "inbound.placement": "first" in (inbound.placement, outbound.placement),
        "outbound.exclude_for_owners": outbound.exclude_for_owners,
        "outbound.owners": listed or owners.exclude.uids or owners.exclude.cgroups,
        "interfaces.reroute": any(
            r.include not in (None, (), outbound.cidrs.include)
            or (outbound.cidrs.exclude if r.exclude is None else r.exclude)
            for r in plan.interfaces.reroute
        ),
        "inbound.tproxy.before_reroute": tproxy and plan.interfaces.reroute and not inbound.tproxy.before_reroute,
        "dns.addresses": dns.addresses,
        "proxy.loopback": sorted(block.family for block in proxy.loopback) != ["ip", "ip6"],
        "ipv6": plan.ipv6 == "block",
    }
    yield from (path for path, wanted in unsaid.items() if wanted)


def _of_version(plan: CapturePlan, name: Name) -> Iterator[str]:
    proxy, dns, tproxy = plan.proxy, plan.dns, plan.inbound.mode == "tproxy"
    callers = proxy.self_calls
    first = isinstance(callers, Owners) and [tuple(each) for each in callers.uids] == [(u, u) for u in proxy.uids[:1]]
    bypass = plan.outbound.loopback == "bypass"
    if name == "istio-1.4":
        said = callers == "everyone" and bypass
        tunnel: tuple[str, ...] = proxy.tunnel_exempt if proxy.tunnel_port is None else ()
    else:
        by_any = not bypass or (tproxy and bool(plan.inbound.ports.include))
        said = callers == "proxy" if by_any else first and isinstance(callers, Owners) and not any(callers[1:])
        tunnel = (() if tproxy else ("inbound",)) + (("self-calls",) if name == "istio" else ())
    gids = {(gid, gid) for gid in proxy.gids}
    unsaid = {
        "proxy.self_calls": not said,
        "proxy.tunnel_exempt": proxy.tunnel_exempt != tunnel,
        "dns.capture": dns.capture != "none" and name == "istio-1.4",
        "dns.udp_exempt": dns.capture != "none" and (dns.udp_exempt == "proxy") != (name == "istio-1.11"),
        "dns.self_calls": dns.capture != "none" and (dns.self_calls.uids or {*dns.self_calls.gids} != gids),
    }
    yield from (path for path, wanted in unsaid.items() if wanted)
