"""Random plans from the whole of CapturePlan, and random flows that are likely to meet what a plan speaks of."""

from __future__ import annotations

from hypothesis import strategies as st

from netapply.flow import TCP, UDP, Flow
from netapply.plan import (
    CapturePlan,
    Cgroup,
    Dns,
    IdRange,
    Inbound,
    InboundPorts,
    Interfaces,
    Ipv6Groups,
    LogSettings,
    Mark,
    Outbound,
    OutboundCidrs,
    OutboundPorts,
    OwnerException,
    OwnerRules,
    Owners,
    Proxy,
    Reroute,
    Sources,
    TProxyRouting,
)
from netapply.ruleset import Cidr, PortRange

#: Few values, so that plans and flows often speak of the same thing.
ADDRESSES_4 = [bytes(map(int, a.split("."))) for a in ("127.0.0.1", "127.0.0.6", "10.0.0.5", "10.0.1.9", "192.168.1.1")]
ADDRESSES_6 = [b"\0" * 15 + b"\1", b"\0" * 15 + b"\6", b"\xfd" + b"\0" * 14 + b"\5", b"\xfd\1" + b"\0" * 13 + b"\x09"]
PORTS = [22, 53, 80, 443, 15001, 15006, 15008, 15020, 15021, 15053, 15090]
IDS = [0, 1000, 1337, 2000]
IFACES = ["eth0", "eth1", "docker0", "br-1"]
CGROUPS = ["system.slice", "system.slice/envoy.service", "user.slice"]


def masked(packed: bytes, prefix: int) -> Cidr:
    """The block of this length that holds the address."""
    bits = len(packed) * 8
    number = int.from_bytes(packed) >> (bits - prefix) << (bits - prefix)
    return Cidr(number.to_bytes(len(packed)), prefix)


def disjoint(blocks: list[Cidr]) -> tuple[Cidr, ...]:
    """Sorted, and without those that another one covers, as the loader gives them."""
    kept: list[Cidr] = []
    for block in sorted(set(blocks)):
        last = kept[-1] if kept and len(kept[-1].packed) == len(block.packed) else None
        if last is None or masked(block.packed, last.prefix) != last:
            kept.append(block)
    return tuple(kept)


def merged(ranges: list[PortRange]) -> tuple[PortRange, ...]:
    """Sorted and disjoint, neighbours joined."""
    out: list[PortRange] = []
    for item in sorted(ranges):
        if out and item.first <= out[-1].last + 1:
            out[-1] = PortRange(out[-1].first, max(out[-1].last, item.last))
        else:
            out.append(item)
    return tuple(out)


def made(kind: type, **fields: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """A named tuple of these fields, the others by default (st.builds would invent values for those too)."""
    return st.fixed_dictionaries(fields).map(lambda values: kind(**values))


blocks_4 = st.builds(masked, st.sampled_from(ADDRESSES_4), st.sampled_from([8, 16, 24, 31, 32]))
blocks_6 = st.builds(masked, st.sampled_from(ADDRESSES_6), st.sampled_from([8, 16, 64, 127, 128]))
cidrs = st.lists(blocks_4 | blocks_6, max_size=4).map(disjoint)
port = st.sampled_from(PORTS)
port_range = st.builds(lambda a, b: PortRange(min(a, b), max(a, b)), port, port) | port.map(lambda p: PortRange(p, p))
ports = st.lists(port_range, max_size=4).map(merged)
id_range = st.sampled_from(IDS).map(lambda i: IdRange(i, i)) | st.just(IdRange(1000, 1999))
ids = st.lists(id_range, max_size=2, unique=True).map(tuple)
cgroups = st.lists(st.sampled_from(CGROUPS).map(lambda c: Cgroup(c, 1)), max_size=1).map(tuple)
owners = st.builds(Owners, ids, ids, cgroups)
some_owners = owners.filter(lambda o: bool(o.uids or o.gids or o.cgroups))
everything = st.just("*")
marks = st.sampled_from([Mark(1337), Mark(0x539, 0xFFF), Mark(0x100, 0x100)])
names = st.sampled_from([*IFACES, "br+"])
placements = st.sampled_from(["first", "last"])

proxies = made(
    Proxy,
    uids=st.sampled_from([(1337,), (1337, 2000), ()]),
    gids=st.sampled_from([(1337,), ()]),
    tunnel_port=st.sampled_from([None, 15008]),
    mark=st.none() | marks,
    probe_sources=st.just(()) | cidrs,
    self_calls=st.sampled_from(["proxy", "everyone", "none"]) | some_owners,
)
reroutes = st.builds(Reroute, names, st.none() | everything | cidrs, st.none() | cidrs)
dns_plans = made(
    Dns,
    capture=st.sampled_from(["none", "all"]),
    port=st.just(15053),
    addresses=st.sampled_from([(), (ADDRESSES_4[2],), (ADDRESSES_4[2], ADDRESSES_6[2])]),
    zones=st.booleans(),
) | made(Dns, capture=st.just("servers"), servers=cidrs.filter(bool), zones=st.booleans())

inbounds = made(
    Inbound,
    mode=st.sampled_from(["redirect", "tproxy", "none"]),
    ports=st.builds(InboundPorts, everything | ports, ports),
    sources=st.builds(Sources, cidrs),
    tproxy=st.builds(TProxyRouting, marks, st.just(133)),
    placement=placements,
)
outbounds = made(
    Outbound,
    cidrs=st.builds(OutboundCidrs, everything | cidrs, cidrs),
    ports=st.builds(OutboundPorts, ports, ports),
    owners=st.builds(OwnerRules, everything | some_owners, owners),
    exclude_for_owners=st.lists(
        st.builds(OwnerException, st.sampled_from(["tcp", "udp"]), everything | ports.filter(bool), some_owners),
        max_size=2,
    ).map(tuple),
    loopback=st.sampled_from(["bypass", "capture"]),
    placement=placements,
)
interfaces = st.builds(
    Interfaces,
    st.lists(names, max_size=1).map(tuple),
    st.lists(reroutes, max_size=2).map(tuple),
).filter(lambda it: not (it.reroute and it.exclude))

plans = made(
    CapturePlan,
    proxy=proxies,
    inbound=inbounds,
    outbound=outbounds,
    interfaces=interfaces,
    dns=dns_plans,
    ipv6=st.sampled_from(["capture", "skip", "block"]),
    for_ipv6=st.none()
    | st.builds(
        Ipv6Groups,
        st.none() | proxies,
        st.none() | inbounds,
        st.none() | outbounds,
        st.none() | interfaces,
        st.none() | dns_plans,
    ),
    invalid=st.sampled_from(["keep", "drop"]),
    log=st.none() | st.just(LogSettings("netapply ")),
    comments=st.booleans(),
)


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """The first packet of a flow. Inbound ones never come over lo: those were sent, and decided, outbound."""
    addresses = draw(st.sampled_from([ADDRESSES_4, ADDRESSES_6]))
    direction = draw(st.sampled_from(["outbound", "inbound"]))
    outbound = direction == "outbound"
    protocol = draw(st.sampled_from([TCP, TCP, UDP, 1]))
    return Flow(
        direction,
        protocol,
        draw(st.sampled_from(addresses)),
        draw(st.sampled_from(addresses)),
        draw(st.sampled_from([*PORTS, 40000])),
        draw(st.sampled_from([*PORTS, 8080])),
        draw(st.sampled_from([*IFACES, *(["lo"] * 3 if outbound else [])])),
        draw(st.sampled_from(IDS)) if outbound else -1,
        draw(st.sampled_from(IDS)) if outbound else -1,
        draw(st.sampled_from([*CGROUPS, ""])) if outbound else "",
        draw(
            st.sampled_from(
                ["new", "new", "new", "established", "invalid", *(["picked-up"] if protocol == TCP else [])]
            )
        ),
        draw(st.sampled_from([0, 0, 1337, 0x100])),
    )
