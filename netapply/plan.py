"""CapturePlan: which traffic of a network namespace goes to a local proxy. The user's words, resolved and typed.

A plan is read from a file by `netapply.planfile`, which reports every fault at once; names of users and groups,
and the servers of resolv.conf, are already numbers and addresses here. It says *what*; it knows nothing of rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from netapply.ruleset import Cidr, Family, PortRange
from netapply.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

API_VERSION = "netapply/v1"

InboundMode: TypeAlias = Literal["redirect", "tproxy", "none"]
Placement: TypeAlias = Literal["first", "last"]
Everything: TypeAlias = Literal["*"]
LOOPBACK = (Cidr(b"\x7f\0\0\1", 32), Cidr(b"\0" * 15 + b"\1", 128))
PASSTHROUGH = (Cidr(b"\x7f\0\0\6", 32), Cidr(b"\0" * 15 + b"\6", 128))


class Mark(NamedTuple):
    """A packet mark: bits of `mask` equal `value`. Written `0x539/0xfff`."""

    value: int
    mask: int = 0xFFFFFFFF


class IdRange(NamedTuple):
    """User or group ids first..last, both included."""

    first: int
    last: int


class Cgroup(NamedTuple):
    """A cgroup v2 by its path below the root (no leading slash), with the inode of its directory (0 if absent)."""

    path: str
    id: int = 0


class Owners(NamedTuple):
    """Processes, by what owns their sockets. Any one of the entries is enough."""

    uids: tuple[IdRange, ...] = ()
    gids: tuple[IdRange, ...] = ()
    cgroups: tuple[Cgroup, ...] = ()


class Proxy(NamedTuple):
    """The local proxy: what it listens on, and how its own traffic is told from everybody else's."""

    uids: tuple[int, ...] = (1337,)
    gids: tuple[int, ...] = (1337,)
    allow_root: bool = False
    outbound_port: int = 15001
    inbound_port: int = 15006
    #: Port of the mesh's own tunnel: never captured inbound, and never turned back by a self-call.
    tunnel_port: int | None = 15008
    #: Where the tunnel's port is left alone: coming in, and in self-calls.
    tunnel_exempt: tuple[Literal["inbound", "self-calls"], ...] = ("inbound", "self-calls")
    #: Packets of the proxy that carry this mark are exempt like those of its uid.
    mark: Mark | None = None
    #: Destinations on `lo` that mean "this process group talks among itself".
    loopback: tuple[Cidr, ...] = LOOPBACK
    #: Sources that the proxy binds when it hands an inbound connection to the application.
    passthrough_sources: tuple[Cidr, ...] = PASSTHROUGH
    #: Health probes come from here: not captured inbound, and answers to them not outbound.
    probe_sources: tuple[Cidr, ...] = ()
    #: Whose calls to the namespace's own address go to the inbound port.
    self_calls: Literal["proxy", "everyone", "none"] | Owners = "proxy"


class InboundPorts(NamedTuple):
    """TCP ports that are captured inbound; exclude wins."""

    include: Everything | tuple[PortRange, ...] = "*"
    exclude: tuple[PortRange, ...] = ()


class Sources(NamedTuple):
    """Remote addresses whose connections are not captured inbound."""

    exclude: tuple[Cidr, ...] = ()


class Destinations(NamedTuple):
    """Local addresses to which connections are not captured inbound."""

    exclude: tuple[Cidr, ...] = ()


class TProxyRouting(NamedTuple):
    """The mark and the routing table that deliver a TPROXY packet to the proxy."""

    mark: Mark = Mark(1337)
    table: int = 133
    #: The proxy's transparent port; None means `proxy.inbound_port`.
    port: int | None = None
    #: TPROXY takes what it captures before `interfaces.reroute` looks at it.
    before_reroute: bool = False


class Inbound(NamedTuple):
    """TCP connections that reach the namespace from a device."""

    mode: InboundMode = "redirect"
    ports: InboundPorts = InboundPorts()
    sources: Sources = Sources()
    destinations: Destinations = Destinations()
    tproxy: TProxyRouting = TProxyRouting()
    placement: Placement = "first"


class OutboundCidrs(NamedTuple):
    """Destinations whose TCP connections are captured; exclude wins."""

    include: Everything | tuple[Cidr, ...] = "*"
    exclude: tuple[Cidr, ...] = ()


class OutboundPorts(NamedTuple):
    """`exclude`: TCP and UDP (so DNS too), before all else. `include`: TCP, captured anywhere but cidrs.exclude."""

    include: tuple[PortRange, ...] = ()
    exclude: tuple[PortRange, ...] = ()


class OwnerRules(NamedTuple):
    """Whose traffic is captured: everybody's, or only that of `include`; never that of `exclude`."""

    include: Everything | Owners = "*"
    exclude: Owners = Owners()


class OwnerException(NamedTuple):
    """These owners' traffic by this protocol to these ports is left alone, DNS included."""

    protocol: Literal["tcp", "udp"]
    ports: Everything | tuple[PortRange, ...]
    owners: Owners


class Outbound(NamedTuple):
    """TCP connections that processes of the namespace open."""

    cidrs: OutboundCidrs = OutboundCidrs()
    ports: OutboundPorts = OutboundPorts()
    owners: OwnerRules = OwnerRules()
    exclude_for_owners: tuple[OwnerException, ...] = ()
    #: What applications send over `lo`: left alone, or treated as any other destination.
    loopback: Literal["bypass", "capture"] = "bypass"
    placement: Placement = "first"


class Reroute(NamedTuple):
    """What comes in by `interface` (a trailing `+` is a wildcard) is captured as outbound; nothing else of it is.

    `include` and `exclude` are destinations; None means those of `outbound.cidrs`.
    """

    interface: str
    include: Everything | tuple[Cidr, ...] | None = None
    exclude: tuple[Cidr, ...] | None = None


class Interfaces(NamedTuple):
    """Devices with a treatment of their own. Wildcards end in `+`."""

    exclude: tuple[str, ...] = ()
    reroute: tuple[Reroute, ...] = ()


class Dns(NamedTuple):
    """UDP and TCP to port 53. `servers` are those that are captured when `capture` is "servers"."""

    capture: Literal["none", "servers", "all"] = "none"
    servers: tuple[Cidr, ...] = ()
    #: Local port that answers, or the port of `address`.
    port: int = 15053
    #: Packed addresses to DNAT to, at most one a family; none means REDIRECT to `port`.
    addresses: tuple[bytes, ...] = ()
    #: Conntrack zones keep a client's query and the proxy's own, to the same server, apart.
    zones: bool = True
    #: What exempts queries over UDP: all that exempts TCP, or being the proxy's own alone.
    udp_exempt: Literal["outbound", "proxy"] = "outbound"
    #: Whose TCP queries to the namespace's own address go to the inbound port; never those of the proxy's uids.
    self_calls: Owners = Owners()


class LogSettings(NamedTuple):
    """Captured flows are logged to the kernel log, at most `rate` a minute."""

    prefix: str
    rate: int = 60


class Ipv6Groups(NamedTuple):
    """Groups of the plan that IPv6 has of its own, each whole; None is the group that stands for IPv4."""

    proxy: Proxy | None = None
    inbound: Inbound | None = None
    outbound: Outbound | None = None
    interfaces: Interfaces | None = None
    dns: Dns | None = None


class CapturePlan(NamedTuple):
    """The whole plan. Every group has defaults; an empty file with the apiVersion is Istio's usual sidecar."""

    proxy: Proxy = Proxy()
    inbound: Inbound = Inbound()
    outbound: Outbound = Outbound()
    interfaces: Interfaces = Interfaces()
    dns: Dns = Dns()
    ipv6: Literal["capture", "skip", "block"] = "capture"
    #: What IPv6 has of its own; None: all is decided alike for both families.
    for_ipv6: Ipv6Groups | None = None
    invalid: Literal["keep", "drop", "drop-all"] = "keep"
    log: LogSettings | None = None
    comments: bool = False
    activation: Literal["now", "on-listen"] = "now"
    #: Features to do without where the kernel lacks them; all others are required.
    prefer: tuple[Literal["comments", "log", "dns.zones", "invalid", "cgroups", "sets"], ...] = ()


def plan_of(plan: CapturePlan, family: Family) -> CapturePlan:
    """The plan as it stands for one family, with nothing in `for_ipv6`."""
    own = plan.for_ipv6
    if own is None:
        return plan
    plan = plan._replace(for_ipv6=None)
    if family == "ip6":
        groups = {name: group for name, group in own._asdict().items() if group is not None}
        plan = plan._replace(**groups)
    return plan


def in_each_family(plan: CapturePlan, change: Callable[[CapturePlan], CapturePlan]) -> CapturePlan:
    """The plan after a change that is made to each group by itself, and to those that IPv6 has of its own."""
    own, done = plan.for_ipv6, change(plan_of(plan, "ip"))
    if own is None:
        return done
    ip6 = change(plan_of(plan, "ip6"))
    groups = (None if group is None else getattr(ip6, name) for name, group in own._asdict().items())
    return done._replace(for_ipv6=Ipv6Groups(*groups))


def path_of(plan: CapturePlan, family: Family, path: str) -> str:
    """Where in the plan a path of `plan_of(plan, family)` stands: in `for_ipv6`, if that has the group."""
    own = plan.for_ipv6 if family == "ip6" else None
    return f"for_ipv6.{path}" if getattr(own, path.partition(".")[0], None) is not None else path
