"""The kernel's own news of one namespace: that nf_tables rules changed and who did it, that routing changed.

News are hints to look, never facts. Only messages of port id 0 are the kernel's: any process of the namespace can send
others to our socket, and these are counted and dropped.
"""

from __future__ import annotations

import errno
import struct
from sys import byteorder

from netapply.agent.events import Cause
from netapply.kernel import NETLINK_NETFILTER, NETLINK_ROUTE
from netapply.namespace import Namespace
from netapply.reaper import close_later
from netapply.sockets import socket
from netapply.values import NamedTuple

_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
#: linux/rtnetlink.h: links, addresses, routes and policy rules of both families.
_RTNLGRP = (1, 5, 9, 7, 11, 8, 19)
_NEWGEN = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN
_GEN_ID, _GEN_PROC_PID, _GEN_PROC_NAME = 1, 2, 3  # enum nft_gen_attributes
_SO_ATTACH_FILTER = 26
_MSG_DONTWAIT = 0x40
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter
_PROGRAM = struct.Struct("HP")  # struct sock_fprog
_DATAGRAM = 1 << 15
#: Causes that are told of one look: the last ones matter.
_KEPT = 16


class News(NamedTuple):
    """What was waiting: who changed nf_tables rules, in order; whether routing changed; whether something was lost."""

    causes: tuple[Cause, ...] = ()
    routing: bool = False
    overrun: bool = False
    messages: int = 0
    forged: int = 0

    def and_also(self, other: News) -> News:
        """Both together."""
        return News(
            (self.causes + other.causes)[-_KEPT:],
            self.routing or other.routing,
            self.overrun or other.overrun,
            self.messages + other.messages,
            self.forged + other.forged,
        )


class Monitor:
    """One socket that news come to. `fileno` is readable when there are some; `read` never waits."""

    def __init__(self, sock: socket.socket, *, routing: bool) -> None:
        self._socket = sock
        self._routing = routing

    def fileno(self) -> int:
        """The descriptor to wait on; -1 once closed."""
        return self._socket.fileno()

    def read(self) -> News:
        """All that is there."""
        causes: list[Cause] = []
        overrun, messages, forged = False, 0, 0
        while True:
            try:
                data, sender = self._socket.recvfrom(_DATAGRAM, _MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                overrun = True
                if error.errno == errno.ENOBUFS:  # more happened than there was room for; what there was is there
                    continue
                break
            if sender[0]:
                forged += 1
                continue
            messages += 1
            if not self._routing and (cause := _cause(data)):
                causes.append(cause)
        return News(tuple(causes[-_KEPT:]), self._routing and messages > 0, overrun, messages, forged)

    def close(self) -> None:
        """No more news. A netfilter socket is closed a moment later, as close(2) would wait for RCU."""
        if self._socket.fileno() >= 0:
            close_later(self._socket.detach())


def watch_rules(namespace: Namespace) -> Monitor:
    """News of nf_tables commits. Raises OSError."""
    return Monitor(namespace.visit(_open_rules), routing=False)


def watch_routing(namespace: Namespace) -> Monitor:
    """News of links, addresses, routes and policy rules. Raises OSError."""
    return Monitor(namespace.visit(_open_routing), routing=True)


def _open_rules() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    try:
        _only_generations(sock)
        sock.bind((0, 0))  # who has no port id gets no multicast
        sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
    except BaseException:
        sock.close()
        raise
    return sock


def _open_routing() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE)
    try:
        sock.bind((0, 0))
        for group in _RTNLGRP:
            sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    except BaseException:
        sock.close()
        raise
    return sock


def _only_generations(sock: socket.socket) -> None:
    """Let the kernel drop all but NEWGEN, which it sends by itself after each commit: objects need not be copied."""
    import ctypes

    wanted = int.from_bytes(_NEWGEN.to_bytes(2, byteorder), "big")  # BPF loads in the network's order
    code = b"".join(
        (
            _INSTRUCTION.pack(0x28, 0, 0, 4),  # ldh [4]: nlmsg_type
            _INSTRUCTION.pack(0x15, 0, 1, wanted),  # jeq
            _INSTRUCTION.pack(0x06, 0, 0, 0xFFFFFFFF),  # ret: all of it
            _INSTRUCTION.pack(0x06, 0, 0, 0),  # ret: nothing
        )
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(4, ctypes.addressof(buffer)))


def _cause(data: bytes) -> Cause | None:
    """Who made the generation that a NEWGEN message tells of; None where it is no such message."""
    if len(data) < 20 or _HEADER.unpack_from(data)[1] != _NEWGEN:
        return None
    generation, pid, process = 0, 0, ""
    offset = 20  # struct nlmsghdr and struct nfgenmsg
    while offset + 4 <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if size < 4:
            break
        value = data[offset + 4 : offset + size]
        if kind & 0x3FFF == _GEN_ID:
            generation = int.from_bytes(value)
        elif kind & 0x3FFF == _GEN_PROC_PID:
            pid = int.from_bytes(value)
        elif kind & 0x3FFF == _GEN_PROC_NAME:
            process = value.rstrip(b"\0").decode("utf-8", "backslashreplace")
        offset += (size + 3) & ~3
    return Cause(pid, process, generation)


def raise_descriptor_limit() -> int:
    """Allow this process as many descriptors as it may have (a namespace takes about ten), and return how many."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
