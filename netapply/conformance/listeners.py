"""Listeners in both namespaces: they say which of them had a probe, as sent to whom, and send its token back."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, TypeAlias

from netapply.conformance.case import APP, Endpoint, Sender
from netapply.conformance.clients import SO_LINGER_NOW
from netapply.conformance.world import AF, World, acting_as, endpoint, other_users
from netapply.lab import syscalls
from netapply.lab.actors import IPV6_FREEBIND, set_transparent
from netapply.lab.proxy import SO_ORIGINAL_DST
from netapply.lab.services import IP_PKTINFO
from netapply.ruleset import Family
from netapply.values import NamedTuple

_IN_PKTINFO = struct.Struct("=i4s4s")  # struct in_pktinfo: ifindex, spec_dst, addr
_IN6_PKTINFO = struct.Struct("=16si")  # struct in6_pktinfo: addr, ifindex
_SOCKADDR: dict[Family, struct.Struct] = {"ip": struct.Struct("!2xH4s8x"), "ip6": struct.Struct("!2xH4x16s4x")}
_LEVEL: dict[Family, int] = {"ip": socket.IPPROTO_IP, "ip6": socket.IPPROTO_IPV6}

Protocol: TypeAlias = Literal["tcp", "udp"]


class Where(NamedTuple):
    """One listener: in which namespace, of which family and protocol, on which port of every address."""

    place: Literal["pod", "remote"]
    family: Family
    protocol: Protocol
    port: int


class Heard(NamedTuple):
    """What a listener learned of one probe."""

    where: Where
    local: Endpoint
    peer: Endpoint
    original: Endpoint | None


class Connection(NamedTuple):
    """A connection that a listener took."""

    where: Where
    sock: socket.socket


class _Listener(NamedTuple):
    sock: socket.socket
    owner: Sender
    transparent: bool


#: Told of each token that arrived: (token, what was heard); whether to answer it.
Hear: TypeAlias = Callable[[bytes, Heard], bool]


class Listeners:
    """All listeners of a world. They are opened when first needed, and kept."""

    def __init__(self, world: World, epoll: select.epoll) -> None:
        self._world = world
        self._epoll = epoll
        self._listeners: dict[Where, _Listener] = {}
        self._by_fd: dict[int, Where] = {}
        self._connections: dict[int, Connection] = {}

    def want(self, wanted: Iterable[tuple[Where, Sender, bool]]) -> None:
        """Have these listeners, with these owners; those marked True are transparent. Raises OSError."""
        missing: list[tuple[Where, Sender, bool]] = []
        for where, owner, transparent in dict.fromkeys(wanted):
            found = self._listeners.get(where)
            if found is None or found[1:] != (owner, transparent):
                self.absent(where)
                missing.append((where, owner, transparent))
        for place in (self._world.pod, self._world.remote):
            here = [each for each in missing if self._world.place(each[0].place) is place]
            if here:
                place.inside(partial(self._open_all, here))

    def absent(self, where: Where) -> None:
        """Have no such listener."""
        found = self._listeners.pop(where, None)
        if found is not None:
            self._by_fd.pop(found.sock.fileno(), None)
            found.sock.close()

    def deafen(self, *, on: bool) -> None:
        """Have all listeners take nothing and answer nothing, or undo that."""
        for each in self._listeners.values():
            (syscalls.deafen if on else syscalls.undeafen)(each.sock)

    def ready(self, fd: int, hear: Hear) -> bool:
        """Something came for this descriptor; False when it is none of these."""
        where = self._by_fd.get(fd)
        if where is not None:
            sock = self._listeners[where].sock
            self._accept(where, sock) if where.protocol == "tcp" else _datagrams(where, sock, hear)
            return True
        connection = self._connections.get(fd)
        if connection is not None:
            self._read(fd, connection, hear)
        return connection is not None

    def hang_up(self) -> None:
        """Close all connections."""
        for fd in [*self._connections]:
            self._drop(fd)

    def close(self) -> None:
        """Close everything."""
        self.hang_up()
        for where in [*self._listeners]:
            self.absent(where)

    def _open_all(self, missing: list[tuple[Where, Sender, bool]]) -> None:
        for each in missing:
            self._open(*each)

    def _open(self, where: Where, owner: Sender, transparent: bool) -> None:  # noqa: FBT001 - as in `want`
        kind = socket.SOCK_STREAM if where.protocol == "tcp" else socket.SOCK_DGRAM
        with acting_as(owner if other_users() else APP):
            sock = socket.socket(AF[where.family], kind)
        try:
            sock.settimeout(0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if where.family == "ip6":
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if transparent:
                set_transparent(sock)
            if where.protocol == "udp":
                _tell_destination(sock, where.family)
            sock.bind(("", where.port))
            if where.protocol == "tcp":
                sock.listen(4096)
        except BaseException:
            sock.close()
            raise
        self._listeners[where] = _Listener(sock, owner, transparent)
        self._by_fd[sock.fileno()] = where
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _accept(self, where: Where, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            sock.settimeout(0)
            self._connections[sock.fileno()] = Connection(where, sock)
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _read(self, fd: int, connection: Connection, hear: Hear) -> None:
        where, sock = connection
        try:
            token = sock.recv(64)
            if token:
                ends = endpoint(sock.getsockname()), endpoint(sock.getpeername())
                if hear(token, Heard(where, *ends, _original(sock, where.family))):
                    sock.send(token)
                return
        except BlockingIOError:
            return
        except OSError:  # the client went away
            pass
        self._drop(fd)

    def _drop(self, fd: int) -> None:
        _, sock = self._connections.pop(fd)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SO_LINGER_NOW)
        sock.close()


def _tell_destination(sock: socket.socket, family: Family) -> None:
    if family == "ip6":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)  # or EINVAL for an address that no device has
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def _datagrams(where: Where, sock: socket.socket, hear: Hear) -> None:
    """Answer each from the very address that it was sent to, as conntrack wants to see it."""
    while True:
        try:
            token, ancillary, _, peer = sock.recvmsg(64, 64)
            level, kind, data = ancillary[0]
            if level == socket.IPPROTO_IPV6:
                address, _ = _IN6_PKTINFO.unpack(data)
                source = _IN6_PKTINFO.pack(address, 0)
            else:
                _, _, address = _IN_PKTINFO.unpack(data)
                source = _IN_PKTINFO.pack(0, address, b"\0\0\0\0")
            local = socket.inet_ntop(AF[where.family], address), where.port
            if hear(token, Heard(where, local, endpoint(peer), None)):
                sock.sendmsg([token], [(level, kind, source)], 0, peer)
        except BlockingIOError:
            return
        except OSError:  # a pending ICMP error of an earlier reply, or a client that cannot be reached
            continue


def _original(sock: socket.socket, family: Family) -> Endpoint | None:
    layout = _SOCKADDR[family]
    try:
        port, packed = layout.unpack(sock.getsockopt(_LEVEL[family], SO_ORIGINAL_DST, layout.size))
    except OSError:  # no entry in conntrack
        return None
    return socket.inet_ntop(AF[family], packed), port
