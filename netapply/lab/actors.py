"""Actors: who opens a socket, and where. An actor is a namespace and a uid and gid, without a process of its own.

Linux credentials belong to threads, and netfilter's owner matches look at the file system ids with which a socket was
opened; a socket stays in the namespace that it was opened in. So one event loop serves the sockets of everybody.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

from netapply import syscalls
from netapply.lab.answers import Endpoint
from netapply.lab.namespaces import Place
from netapply.ruleset import Family
from netapply.values import NamedTuple

IP_FREEBIND, IP_TRANSPARENT = 15, 19  # linux/in.h; socket has no names for them
IPV6_TRANSPARENT, IPV6_FREEBIND = 75, 78  # linux/in6.h
SO_MARK = 36  # asm-generic/socket.h
MTU = 65536
_AF = {"ip": socket.AF_INET, "ip6": socket.AF_INET6}


class Identity(NamedTuple):
    """User and group id of a socket's owner."""

    uid: int
    gid: int


#: Who there is: on which side, and as whom.
ACTORS: dict[str, tuple[Literal["pod", "remote"], Identity]] = {
    "app": ("pod", Identity(1000, 1000)),
    "proxy": ("pod", Identity(1337, 1337)),
    "agent": ("pod", Identity(1337, 1337)),
    "root": ("pod", Identity(0, 0)),
    "remote": ("remote", Identity(0, 0)),
}


@contextmanager
def acting_as(identity: Identity) -> Generator[None]:
    """What this thread opens meanwhile belongs to `identity`. Must not be held over an await."""
    before = Identity(os.geteuid(), os.getegid())
    syscalls.set_filesystem_ids(*identity)
    try:
        yield
    finally:
        syscalls.set_filesystem_ids(*before)


class OwnedSocket(socket.socket):
    """A socket whose accepted connections have the owner that it has itself, as they would in a process of its own."""

    def __init__(self, family: int, kind: int, identity: Identity) -> None:
        super().__init__(family, kind)
        self.identity = identity

    def accept(self) -> tuple[socket.socket, Any]:
        with acting_as(self.identity):
            return super().accept()


class Actor(NamedTuple):
    """Somebody in a namespace: opens sockets there that belong to `identity`."""

    place: Place
    identity: Identity

    def open(self, family: Family, kind: socket.SocketKind = socket.SOCK_STREAM) -> OwnedSocket:
        """A new non-blocking socket. Raises OSError; PermissionError without CAP_SETUID and CAP_SETGID."""

        def work() -> OwnedSocket:
            with acting_as(self.identity):
                return OwnedSocket(_AF[family], kind, self.identity)

        sock = self.place.inside(work)
        sock.settimeout(0)
        return sock

    def bound(
        self, family: Family, port: int, kind: socket.SocketKind = socket.SOCK_STREAM, *, transparent: bool = False
    ) -> OwnedSocket:
        """A socket bound to `port` of every address of one family; a TCP one listens. Raises OSError."""
        sock = self.open(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == "ip6":
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if transparent:
                set_transparent(sock)
            sock.bind(("", port))
            if kind == socket.SOCK_STREAM:
                sock.listen(128)
        except BaseException:
            sock.close()
            raise
        return sock

    async def connect(
        self, to: Endpoint, *, source: Endpoint | None = None, mark: int = 0, transparent: bool = False
    ) -> OwnedSocket:
        """A TCP connection to `to`, from `source` if given (port 0: any), as long as the caller lets it try.

        `transparent` allows a source address that is not this host's; `mark` goes on every packet. Raises OSError.
        """
        sock = self.open(family_of(to[0]))
        try:
            if mark:
                sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            if transparent:
                set_transparent(sock)
            if source:
                bind_anywhere(sock, source)
            await asyncio.get_running_loop().sock_connect(sock, to)
        except BaseException:
            sock.close()
            raise
        return sock


def family_of(address: str) -> Family:
    """Which family a numeric address is of."""
    return "ip6" if ":" in address else "ip"


def set_transparent(sock: socket.socket) -> None:
    """IP_TRANSPARENT: the socket takes and sends packets of foreign addresses (ip(7); needs CAP_NET_ADMIN)."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)


def bind_anywhere(sock: socket.socket, source: Endpoint) -> None:
    """Bind to an address that need not be on a device: what a route of type local delivers is ours as well."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    sock.bind(source)
