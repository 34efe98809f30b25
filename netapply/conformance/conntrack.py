"""The namespace's connection tracking table, by ctnetlink (linux/netfilter/nfnetlink_conntrack.h)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

from netapply.kernel import NETLINK_NETFILTER, Kernel
from netapply.values import NamedTuple

_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET and _DELETE
_REQUEST, _ACK, _DUMP, _ERROR = 1, 4, 0x300, 2
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_TUPLE_ORIG, _STATUS, _ZONE = 1, 3, 18  # CTA_*
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_SEEN_REPLY = 2  # IPS_SEEN_REPLY
_PROTOCOLS = {6: "tcp", 17: "udp"}


class Entry(NamedTuple):
    """A tracked flow, as its first packet was."""

    protocol: str
    source: str
    sport: int
    destination: str
    dport: int
    zone: int
    replied: bool

    def __str__(self) -> str:
        zone = f" zone {self.zone}" if self.zone else ""
        return f"{self.protocol} {self.source} port {self.sport} to {self.destination} port {self.dport}{zone}"


def flush(kernel: Kernel) -> None:
    """Forget all flows. Raises OSError, ENOENT or EOPNOTSUPP where the kernel has no ctnetlink."""
    for _ in _messages(kernel, _DELETE, _REQUEST | _ACK):
        pass


def entries(kernel: Kernel) -> tuple[Entry, ...]:
    """All TCP and UDP flows of both families. Raises OSError."""
    return tuple(entry for body in _messages(kernel, _GET, _REQUEST | _DUMP) if (entry := _entry(body)))


def _messages(kernel: Kernel, kind: int, flags: int) -> Iterator[bytes]:
    request = _HEADER.pack(_HEADER.size + 4, kind, flags, 1, 0) + bytes(4)  # struct nfgenmsg: any family
    for data in kernel.netlink(NETLINK_NETFILTER, request):
        at = 0
        while at + _HEADER.size <= len(data):
            length, found, _, _, _ = _HEADER.unpack_from(data, at)
            if found == _ERROR:
                number = -struct.unpack_from("=i", data, at + _HEADER.size)[0]
                if number:
                    raise OSError(number, os.strerror(number))
            elif found >> 8 == 1:
                yield data[at + _HEADER.size + 4 : at + length]
            at += max((length + 3) & ~3, _HEADER.size)


def _entry(body: bytes) -> Entry | None:
    found = _attributes(body)
    original = _attributes(found[_TUPLE_ORIG])
    ends, layer4 = _attributes(original[_TUPLE_IP]), _attributes(original[_TUPLE_PROTO])
    protocol = _PROTOCOLS.get(layer4[1][0])
    if protocol is None:
        return None
    addresses = [_text(ends[number]) for number in ((1, 2) if 1 in ends else (3, 4))]
    sport, dport = (int.from_bytes(layer4[number]) for number in (2, 3))
    zone = int.from_bytes(found.get(_ZONE) or _attributes(found[_TUPLE_ORIG]).get(3, b""))
    replied = bool(int.from_bytes(found[_STATUS]) & _SEEN_REPLY)
    return Entry(protocol, addresses[0], sport, addresses[1], dport, zone, replied)


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            raise OSError(errno.EBADMSG, "an attribute of ctnetlink has no length")
        found[kind & 0x3FFF] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found
