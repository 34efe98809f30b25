"""The plans that are measured. Each comes with an update: one excluded port more."""

from __future__ import annotations

from netapply.plan import PASSTHROUGH, CapturePlan, Outbound, OutboundCidrs, OutboundPorts, Proxy
from netapply.ruleset import Cidr, PortRange

#: What an empty plan file means: Istio's usual sidecar, both families, with its address ::6 on `lo`.
SIDECAR = CapturePlan()
#: The same without the address: rules and nothing beside them, which is all that the restoring tools can do.
RULES = CapturePlan(proxy=Proxy(passthrough_sources=PASSTHROUGH[:1]))

PLANS = {"rules alone": RULES, "sidecar": SIDECAR}


def updated(plan: CapturePlan) -> CapturePlan:
    """The plan with one excluded outbound port more."""
    excluded = (*plan.outbound.ports.exclude, PortRange(65000, 65000))
    return plan._replace(outbound=plan.outbound._replace(ports=plan.outbound.ports._replace(exclude=excluded)))


def excluding_cidrs(count: int, since: int = 0) -> CapturePlan:
    """`count` IPv4 blocks of 256 addresses, none beside another, so that none can be merged, from the `since`th on."""
    blocks = tuple(Cidr((0x0B000000 + (number << 9)).to_bytes(4), 24) for number in range(since, since + count))
    return RULES._replace(outbound=Outbound(cidrs=OutboundCidrs(exclude=blocks)))


def excluding_ports(count: int, since: int = 0) -> CapturePlan:
    """`count` outbound ports, none beside another; from the `since`th on."""
    ports = tuple(PortRange(1024 + 2 * number, 1024 + 2 * number) for number in range(since, since + count))
    return RULES._replace(outbound=Outbound(ports=OutboundPorts(exclude=ports)))
