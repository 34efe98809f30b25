"""Native tables with an owner: whether there can be any, and the sockets that own them, kept over a restart.

The owner is a netfilter socket. While somebody has it open (the service manager does, for the next agent) nobody else
can change the table; the next agent goes on with the very same socket.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from netapply.backend import Snapshot, find_backend
from netapply.kernel import NETLINK_NETFILTER, Kernel
from netapply.namespace import Namespace
from netapply.nsfs import NamespaceId, cookie_of
from netapply.sockets import socket

_can_own: list[bool] = []


@runtime_checkable
class Owning(Protocol):
    """A backend whose tables can have an owner."""

    def can_own(self, kernel: Kernel) -> bool:
        """Whether they can on this kernel."""
        ...

    def is_owned(self, current: Snapshot) -> bool:
        """Whether the table has one."""
        ...


def can_own(namespace: Namespace) -> bool:
    """Whether native tables can have an owner here; asked once, as a kernel does not change while it runs."""
    if not _can_own:
        native = find_backend("nftables")
        _can_own.append(isinstance(native, Owning) and native.can_own(namespace))
    return _can_own[0]


def owner_of(namespace: Namespace) -> tuple[str, int]:
    """The socket that owns what is made in this namespace: a key for it, and its descriptor, which is lent.

    Its port is in the key: where another socket of ours has come in its place, nobody goes on keeping the first.
    """
    sock = namespace.lend(NETLINK_NETFILTER)
    return f"{_prefix(namespace.identity)}{sock.getsockname()[0]}", sock.fileno()


def take_over(namespace: Namespace, kept: Mapping[str, int]) -> None:
    """Go on with the socket that an earlier agent had in this namespace, if it was kept. Raises OSError."""
    prefix = _prefix(namespace.identity)
    for key, fd in kept.items():
        if key.startswith(prefix):
            sock = socket.socket(fileno=os.dup(fd))
            if cookie_of(sock) != namespace.identity.cookie:
                sock.close()
                continue
            _empty(sock)
            namespace.borrow(NETLINK_NETFILTER, sock)
            return


def _prefix(identity: NamespaceId) -> str:
    return f"owner-{identity.device}-{identity.inode}-{identity.cookie}-"


def _empty(sock: socket.socket) -> None:
    """Throw away answers that whoever had it before did not live to read."""
    try:
        while sock.recv(1 << 16, 0x40):  # MSG_DONTWAIT
            pass
    except BlockingIOError:
        return
