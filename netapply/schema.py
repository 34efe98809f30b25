"""The fields of a plan file: one table, from which loader, writer, JSON Schema and texts are made. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from netapply import kinds, plan
from netapply.fields import FAULTY, Check, Choice, Either, Field, Flag, Group, Groups, Json, Kind, Short, Values
from netapply.kinds import all_or, none_or
from netapply.plan import API_VERSION, CapturePlan, Dns, OwnerException, Owners
from netapply.spans import collapse, merge
from netapply.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

KIND = "CapturePlan"
SCHEMA_ID = f"urn:{API_VERSION.replace('/', ':')}:capture-plan"
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def group(made: Any, **fields: Field) -> Group:
    """A group whose fields are those of a named tuple."""
    defaults: Mapping[str, Any] = made._field_defaults

    def make(found: dict[str, Any], _at: str, _check: Check) -> Any:
        return made(**found) if all(name in found or name in defaults for name in fields) else FAULTY

    return Group(fields, defaults, make, _take)


def _take(value: Any) -> Mapping[str, Any]:
    entries: Mapping[str, Any] = value._asdict()
    return entries


_OWNERS = {
    "uids": Field(Values(kinds.UID_RANGE, merge), "User ids, ranges, or names of users."),
    "gids": Field(Values(kinds.GID_RANGE, merge), "Group ids, ranges, or names of groups."),
    "cgroups": Field(
        Values(kinds.CGROUP, kinds.each_once), "Paths of cgroups v2 below the root; what is below them is included."
    ),
}
OWNERS = group(Owners, **_OWNERS)
_OWNERS_OR_WORD = "a mapping of uids, gids and cgroups"


def _make_exception(found: dict[str, Any], _at: str, _check: Check) -> Any:
    if "protocol" not in found or "ports" not in found:
        return FAULTY
    owners = Owners(**{name: found[name] for name in _OWNERS if name in found})
    return OwnerException(found["protocol"], found["ports"], owners)


def _take_exception(value: OwnerException) -> Mapping[str, Any]:
    return {"protocol": value.protocol, "ports": value.ports, **value.owners._asdict()}


EXCEPTION = Group(
    {
        "protocol": Field(Choice(("tcp", "udp")), "tcp or udp."),
        "ports": Field(all_or(kinds.PORTS, "a list of ports"), 'Destination ports, or "*".'),
        **_OWNERS,
    },
    Owners._field_defaults,
    _make_exception,
    _take_exception,
)

_RESOLV_CONF = "resolv.conf"


def _make_dns(found: dict[str, Any], at: str, check: Check) -> Any:
    if found.get("servers", _RESOLV_CONF) == _RESOLV_CONF:
        found["servers"] = _resolvers(f"{at}.servers", check) if found.get("capture") == "servers" else ()
    return Dns(**found)


def _take_dns(value: Dns) -> Mapping[str, Any]:
    unused = value.capture != "servers" and not value.servers
    return {**value._asdict(), "servers": _RESOLV_CONF if unused else value.servers}


def _resolvers(at: str, check: Check) -> tuple[Any, ...]:
    try:
        servers = list(dict.fromkeys(check.lookups.servers()))
    except OSError as error:
        check.refuse(at, _RESOLV_CONF, f"it cannot be read ({error.strerror}): write a list of addresses")
        return ()
    result = kinds.CIDRS.parse(servers, f"{at}({_RESOLV_CONF})", check)
    return () if result is FAULTY else result


DNS = Group(
    {
        "capture": Field(Choice(("none", "servers", "all")), "Which DNS traffic (udp and tcp to port 53) is captured."),
        "servers": Field(
            Either({_RESOLV_CONF: _RESOLV_CONF}, kinds.CIDRS, "write resolv.conf, or a list of addresses"),
            'The servers that are captured when capture is "servers"; those of /etc/resolv.conf unless listed.',
        ),
        "port": Field(kinds.PORT, "Local port that answers, or the port of addresses."),
        "addresses": Field(
            Values(kinds.ADDRESS, kinds.by_family),
            "Where DNS goes instead of the local port, at most one address a family.",
        ),
        "zones": Field(Flag(), "Whether conntrack zones keep a client's query and the proxy's own apart."),
        "udp_exempt": Field(
            Choice(("outbound", "proxy")), "What exempts queries over UDP: all that exempts TCP, or being the proxy's."
        ),
        "self_calls": Field(OWNERS, "Whose TCP queries to the namespace's own address go to the inbound port."),
    },
    {**Dns._field_defaults, "servers": _RESOLV_CONF},
    _make_dns,
    _take_dns,
)

PROXY = group(
    plan.Proxy,
    uids=Field(
        Values(kinds.UID, kinds.each_once),
        "User ids or names that the proxy runs as: their traffic is never captured.",
    ),
    gids=Field(Values(kinds.GID, kinds.each_once), "Group ids or names that the proxy runs as, likewise."),
    allow_root=Field(Flag(), "Whether uid 0 or gid 0 may be exempt: all of root's traffic then bypasses the proxy."),
    outbound_port=Field(kinds.PORT, "Local port that gets outbound connections."),
    inbound_port=Field(kinds.PORT, "Local port that gets inbound connections."),
    tunnel_port=Field(
        none_or(kinds.PORT, "write a port, or none"), "Port of the mesh's own tunnel, never captured inbound; or none."
    ),
    tunnel_exempt=Field(
        Values(Choice(("inbound", "self-calls")), kinds.sorted_once), "Where the tunnel's port is left alone."
    ),
    mark=Field(
        none_or(kinds.MARK, "write a mark, or none"), "Mark of the proxy's own packets, exempt like its uid; or none."
    ),
    loopback=Field(Values(kinds.LOOPBACK, collapse), "Destinations on lo by which processes talk among themselves."),
    passthrough_sources=Field(
        kinds.CIDRS, "Sources that the proxy binds when it hands a connection to the application."
    ),
    probe_sources=Field(kinds.CIDRS, "Sources of health probes: not captured inbound, nor answers to them outbound."),
    self_calls=Field(
        Either(
            {"proxy": "proxy", "everyone": "everyone", "none": "none"},
            OWNERS,
            f"write proxy, everyone, none, or {_OWNERS_OR_WORD}",
        ),
        "Whose calls to the namespace's own address go to the inbound port.",
    ),
)

_PLACEMENT = Field(Choice(("first", "last")), "Whether our rules come before or after everybody else's.")

INBOUND = group(
    plan.Inbound,
    mode=Field(Choice(("redirect", "tproxy", "none")), "How inbound TCP connections are captured, if at all."),
    ports=Field(
        group(
            plan.InboundPorts,
            include=Field(all_or(kinds.PORTS, "a list of ports"), 'TCP ports that are captured, or "*".'),
            exclude=Field(kinds.PORTS, "TCP ports that are not; exclude wins."),
        ),
        "TCP ports that are captured inbound.",
    ),
    sources=Field(
        group(plan.Sources, exclude=Field(kinds.CIDRS, "Remote addresses whose connections are not captured.")),
        "Remote addresses.",
    ),
    destinations=Field(
        group(plan.Destinations, exclude=Field(kinds.CIDRS, "Local addresses to which connections are not captured.")),
        "Local addresses.",
    ),
    tproxy=Field(
        group(
            plan.TProxyRouting,
            mark=Field(kinds.MARK, "The mark by which captured packets are routed to the proxy."),
            table=Field(kinds.TABLE, "The routing table that delivers them."),
            port=Field(
                none_or(kinds.PORT, "write a port, or none"),
                "The proxy's transparent port; proxy.inbound_port when none.",
            ),
            before_reroute=Field(Flag(), "Whether TPROXY is decided before interfaces.reroute."),
        ),
        "What mode tproxy needs.",
    ),
    placement=_PLACEMENT,
)

OUTBOUND = group(
    plan.Outbound,
    cidrs=Field(
        group(
            plan.OutboundCidrs,
            include=Field(all_or(kinds.CIDRS, "a list of blocks"), 'Destinations that are captured, or "*".'),
            exclude=Field(kinds.CIDRS, "Destinations that are not; exclude wins."),
        ),
        "Destinations.",
    ),
    ports=Field(
        group(
            plan.OutboundPorts,
            include=Field(kinds.PORTS, "TCP ports that are captured wherever they go, but for cidrs.exclude."),
            exclude=Field(kinds.PORTS, "TCP and UDP ports that are left alone before anything else, DNS included."),
        ),
        "Destination ports.",
    ),
    owners=Field(
        group(
            plan.OwnerRules,
            include=Field(all_or(OWNERS, _OWNERS_OR_WORD), 'Whose traffic is captured, or "*".'),
            exclude=Field(OWNERS, "Whose is not."),
        ),
        "Processes, by what owns their sockets.",
    ),
    exclude_for_owners=Field(Groups(EXCEPTION), "Traffic by protocol, ports and owners that is left alone."),
    loopback=Field(Choice(("bypass", "capture")), "Whether what applications send over lo is left alone."),
    placement=_PLACEMENT,
)

REROUTE = group(
    plan.Reroute,
    interface=Field(kinds.INTERFACE, "The interface; a trailing + is a wildcard."),
    include=Field(
        Either({None: None, "*": "*"}, kinds.CIDRS, 'write "*" for all, or a list of blocks'),
        "Destinations that are captured; those of outbound.cidrs when left out.",
    ),
    exclude=Field(Either({None: None}, kinds.CIDRS, "write a list of blocks"), "Destinations that are not, likewise."),
)

INTERFACES = group(
    plan.Interfaces,
    exclude=Field(
        Values(kinds.INTERFACE, kinds.each_once), "Interfaces whose traffic is left alone; a trailing + is a wildcard."
    ),
    reroute=Field(
        Groups(Short(REROUTE, "interface")), "Interfaces (of virtual machines, bridges) captured as if outbound."
    ),
)

_LOG = group(
    plan.LogSettings,
    prefix=Field(kinds.LOG_PREFIX, "What a log line begins with, at most 29 characters."),
    rate=Field(kinds.RATE, "At most so many lines a minute."),
)


_AS_FOR_IPV4 = "write the whole group, or none for that of IPv4"
FOR_IPV6 = group(
    plan.Ipv6Groups,
    proxy=Field(none_or(PROXY, _AS_FOR_IPV4), "As proxy, for IPv6."),
    inbound=Field(none_or(INBOUND, _AS_FOR_IPV4), "As inbound, for IPv6."),
    outbound=Field(none_or(OUTBOUND, _AS_FOR_IPV4), "As outbound, for IPv6."),
    interfaces=Field(none_or(INTERFACES, _AS_FOR_IPV4), "As interfaces, for IPv6."),
    dns=Field(none_or(DNS, _AS_FOR_IPV4), "As dns, for IPv6."),
)


def _make_plan(found: dict[str, Any], _at: str, _check: Check) -> CapturePlan:
    return CapturePlan(**{name: value for name, value in found.items() if name in CapturePlan._fields})


def _take_plan(value: CapturePlan) -> Mapping[str, Any]:
    return {"apiVersion": API_VERSION, "kind": KIND, **value._asdict()}


#: A whole plan file.
PLAN = Group(
    {
        "apiVersion": Field(Choice((API_VERSION,)), f"apiVersion: {API_VERSION}"),
        "kind": Field(Choice((KIND,)), f"{KIND}; may be left out."),
        "proxy": Field(PROXY, "The local proxy: what it listens on, and how its own traffic is known."),
        "inbound": Field(INBOUND, "TCP connections that reach the namespace."),
        "outbound": Field(OUTBOUND, "TCP connections that processes of the namespace open."),
        "interfaces": Field(INTERFACES, "Interfaces with a treatment of their own."),
        "dns": Field(DNS, "DNS queries."),
        "ipv6": Field(
            Choice(("capture", "skip", "block")), "Whether IPv6 is captured, bypasses the proxy, or is dropped."
        ),
        "for_ipv6": Field(
            none_or(FOR_IPV6, "write a mapping of groups, or none"),
            "Groups that are otherwise for IPv6, each whole; or none.",
        ),
        "invalid": Field(Choice(("keep", "drop", "drop-all")), "What happens to packets in conntrack state INVALID."),
        "log": Field(
            none_or(_LOG, "write a mapping of prefix and rate, or none"), "Captured flows in the kernel log; or none."
        ),
        "comments": Field(Flag(), "Whether rules carry the plan path that they come from."),
        "activation": Field(Choice(("now", "on-listen")), "When capture begins: now, or once the proxy listens."),
        "prefer": Field(
            Values(Choice(("comments", "log", "dns.zones", "invalid", "cgroups", "sets")), kinds.sorted_once),
            "Features to do without where the kernel lacks them; all others are required.",
        ),
    },
    {"kind": KIND, **CapturePlan._field_defaults},
    _make_plan,
    _take_plan,
)


class PathKind(NamedTuple):
    """A field by its plan path, as `outbound.cidrs.exclude`; `[]` stands for any entry of a list."""

    path: str
    field: Field


def walk_fields(of: Group = PLAN, at: str = "") -> Iterator[PathKind]:
    """Every field of a plan file, groups before what is in them."""
    for name, field in of.fields.items():
        path = f"{at}.{name}" if at else name
        yield PathKind(path, field)
        kind: Kind = field.kind
        if isinstance(kind, Either):
            kind = kind.kind
        if isinstance(kind, Groups):
            path, kind = f"{path}[]", kind.item
        if isinstance(kind, Short):
            kind = kind.group
        if kind is FOR_IPV6:
            continue  # its groups are those of the plan
        if isinstance(kind, Group):
            yield from walk_fields(kind, path)


def json_schema() -> Json:
    """The JSON Schema (draft 2020-12) of a plan file. What the loader accepts, it admits."""
    return {
        "$schema": SCHEMA_DIALECT,
        "$id": SCHEMA_ID,
        "title": KIND,
        "description": "Which traffic of a network namespace goes to a local proxy, and which does not.",
        **PLAN.schema(),
    }
