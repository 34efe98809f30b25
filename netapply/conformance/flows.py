"""Between probes and the specification: the flow that a probe is, and the verdict that a decision means. Pure.

expect = verdict_of(decide(plan, flow_of(probe)))
"""

from __future__ import annotations

import socket

from netapply.conformance import cgroups
from netapply.conformance.case import DIRECT, DROPPED, Probe, Verdict, captured
from netapply.conformance.world import AF, LOOPBACK, POD, is_local, source_of
from netapply.flow import TCP, UDP, Decision, Flow
from netapply.plan import CapturePlan, plan_of


def foreseeable(plan: CapturePlan, probe: Probe) -> bool:
    """Whether the plan alone tells what becomes of the probe, and not the routes of the pod too."""
    plan = plan_of(plan, probe.family)
    mark = plan.inbound.tproxy.mark
    return not (probe.mark and plan.inbound.mode == "tproxy" and probe.mark & mark.mask == mark.value)


def packed(address: str) -> bytes:
    """In network order."""
    return socket.inet_pton(AF["ip6" if ":" in address else "ip"], address)


def flow_of(probe: Probe) -> Flow:
    """The first packet as the pod's hooks see it. A source port that the prober chooses is 0."""
    protocol = TCP if probe.protocol == "tcp" else UDP
    ends = packed(_source(probe)), packed(probe.to)
    if probe.origin == "remote":
        return Flow("inbound", protocol, *ends, probe.sport, probe.port, probe.device, state=probe.state)
    device = "lo" if is_local(probe.to) else probe.device
    sender = probe.sender
    cgroup = f"{cgroups.NAME}/{sender.cgroup}" if sender.cgroup else ""
    return Flow(
        "outbound", protocol, *ends, probe.sport, probe.port, device, sender.uid, sender.gid, cgroup, mark=probe.mark
    )


def verdict_of(decision: Decision) -> Verdict:
    """What sockets show of it."""
    match decision.verdict:
        case "bypass":
            return DIRECT
        case "drop":
            return DROPPED
        case "dnat":
            family = AF["ip6" if len(decision.address) == 16 else "ip"]
            return captured(decision.port, "dnat", socket.inet_ntop(family, decision.address))
        case way:
            return captured(decision.port, way)


def _source(probe: Probe) -> str:
    """As the kernel chooses it where nothing else is said (ip(7), and RFC 6724 for IPv6)."""
    if chosen := source_of(probe):
        return chosen
    if not is_local(probe.to):
        return POD[probe.family]
    return LOOPBACK["ip"] if probe.to.startswith("127.") else probe.to
