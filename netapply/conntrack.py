"""Tracked flows that a plan would treat otherwise now, forgotten: by ctnetlink (linux/netfilter/nfnetlink_conntrack.h).

NAT is decided with a flow's first packet and kept with it. Who forgets the flow makes its next packet a first one. For
UDP that is all: the next query goes where the new rules say. A TCP connection loses its proxy or stays without one,
as its next packet opens nothing: one that NAT had captured ends, and its client connects anew. TPROXY keeps nothing
here: its connections stay with their proxy.

What is compared are the decisions of the rules before and after, not what became of the flow: others may have
translated it, and that is none of our business.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

from netapply.errors import KernelError
from netapply.evaluate import evaluate
from netapply.existing import socket_owners
from netapply.flow import TCP, UDP, Flow
from netapply.kernel import NETLINK_NETFILTER, Kernel
from netapply.ruleset import Ruleset
from netapply.values import NamedTuple

_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK; IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE
_REQUEST, _ACK, _DUMP, _ERROR = 1, 4, 0x300, 2
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_NESTED = 0x8000
_TUPLE_ORIG, _ID, _ZONE = 1, 12, 18  # CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE
_TUPLE_IP, _TUPLE_PROTO, _TUPLE_ZONE = 1, 2, 3
_GENERAL = {4: b"\2\0\0\0", 16: b"\x0a\0\0\0"}  # struct nfgenmsg: AF_INET, AF_INET6


class Tracked(NamedTuple):
    """A flow as its first packet was, and the attributes by which ctnetlink knows it again."""

    protocol: int
    source: bytes
    destination: bytes
    sport: int
    dport: int
    named: bytes


def forget_changed(kernel: Kernel, before: Ruleset | None, after: Ruleset | None) -> int:
    """Forget the TCP and UDP flows whose first packet would have another fate now; how many. Raises KernelError."""
    old, new = before or Ruleset(), after or Ruleset()
    owners, own = socket_owners(kernel)
    forgotten = 0
    for tracked in _tracked(kernel):
        flow = _flow(tracked, owners, own)
        if not evaluate(old, flow).decision.same_as(evaluate(new, flow).decision):
            forgotten += _forget(kernel, tracked)
    return forgotten


def _flow(tracked: Tracked, owners: dict[tuple[int, int], int], own: frozenset[bytes]) -> Flow:
    """The first packet. Whose source is ours came from a socket here, whose owner is told if it is still open."""
    protocol, source, destination, sport, dport, _ = tracked
    if source not in own and source[0] != 127:
        return Flow("inbound", protocol, source, destination, sport, dport, "")
    looped = destination in own or destination[0] == 127
    uid = owners.get((protocol, sport), -1)
    return Flow("outbound", protocol, source, destination, sport, dport, "lo" if looped else "", uid)


def _tracked(kernel: Kernel) -> list[Tracked]:
    return [found for body in _ask(kernel, _GET, _REQUEST | _DUMP, bytes(4)) if (found := _decoded(body))]


def _decoded(body: bytes) -> Tracked | None:
    found = dict(_attributes(body))
    if _TUPLE_ORIG not in found:
        return None
    original = dict(_attributes(found[_TUPLE_ORIG]))
    ends, transport = dict(_attributes(original[_TUPLE_IP])), dict(_attributes(original[_TUPLE_PROTO]))
    protocol = transport[1][0]
    if protocol not in (TCP, UDP):
        return None
    source, destination = (ends[number] for number in ((1, 2) if 1 in ends else (3, 4)))
    sport, dport = (int.from_bytes(transport[number]) for number in (2, 3))
    zone = found.get(_ZONE, b"")
    named = _attribute(_TUPLE_ORIG | _NESTED, found[_TUPLE_ORIG])
    named += _attribute(_ZONE, zone) if zone else b""
    named += _attribute(_ID, found[_ID]) if _ID in found else b""  # so that a later flow of the same ports stays
    return Tracked(protocol, source, destination, sport, dport, named)


def _forget(kernel: Kernel, tracked: Tracked) -> bool:
    """False where it has ended meanwhile."""
    try:
        _ask(kernel, _DELETE, _REQUEST | _ACK, _GENERAL[len(tracked.source)] + tracked.named)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def _ask(kernel: Kernel, kind: int, flags: int, body: bytes) -> list[bytes]:
    operation = "list tracked flows" if kind == _GET else "forget a tracked flow"
    try:
        answer = kernel.netlink(NETLINK_NETFILTER, _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body)
    except OSError as error:
        raise KernelError(operation, error.errno or 0) from error
    bodies: list[bytes] = []
    for data in answer:
        at = 0
        while at + _HEADER.size <= len(data):
            length, found, _, _, _ = _HEADER.unpack_from(data, at)
            if found == _ERROR:
                if number := -struct.unpack_from("=i", data, at + _HEADER.size)[0]:
                    raise KernelError(operation, number, next_step="it takes nf_conntrack_netlink in the kernel")
            elif found >> 8 == 1:
                bodies.append(data[at + _HEADER.size + 4 : at + length])
            at += max((length + 3) & ~3, _HEADER.size)
    return bodies


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
