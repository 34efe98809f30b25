"""Whether the proxy of a plan listens in a namespace, by sock_diag(7)."""

from __future__ import annotations

import struct

from netapply.kernel import NETLINK_SOCK_DIAG, Kernel
from netapply.plan import CapturePlan
from netapply.sockets import socket

_SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
_REQUEST, _DUMP = 0x1, 0x300
_LISTEN = 1 << 10  # TCP_LISTEN of net/tcp_states.h
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
#: struct inet_diag_req_v2: family, protocol, extensions, padding, states, and a struct inet_diag_sockid of zeros
_ASK = struct.Struct("=BBBxI48x")
_ANSWER = struct.Struct("=BBBB")  # struct inet_diag_msg: family, state, timer, retransmissions; then the sockid
_PORT = struct.Struct(">H")


def proxy_ports(plan: CapturePlan) -> frozenset[int]:
    """The TCP ports that the plan sends connections to: all of them must listen before capture is of use."""
    ports = {plan.proxy.outbound_port}
    if plan.inbound.mode == "redirect":
        ports.add(plan.proxy.inbound_port)
    elif plan.inbound.mode == "tproxy":
        ports.add(plan.inbound.tproxy.port or plan.proxy.inbound_port)
    return frozenset(ports)


def listening_ports(kernel: Kernel) -> frozenset[int]:
    """All TCP ports that somebody listens on in the namespace, of either family. Raises OSError."""
    found: set[int] = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        body = _ASK.pack(family, socket.IPPROTO_TCP, 0, _LISTEN)
        request = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST | _DUMP, 1, 0) + body
        for data in kernel.netlink(NETLINK_SOCK_DIAG, request):
            offset = 0
            while offset + 24 <= len(data):
                size, kind, _, _, _ = _HEADER.unpack_from(data, offset)
                if size < _HEADER.size:
                    break
                if kind == _SOCK_DIAG_BY_FAMILY:
                    found.add(_PORT.unpack_from(data, offset + _HEADER.size + _ANSWER.size)[0])
                offset += (size + 3) & ~3
    return frozenset(found)
