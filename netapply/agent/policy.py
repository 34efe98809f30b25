"""Who may ask the agent for what: by the credentials that the kernel noted when a client connected (unix(7))."""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter, OrderedDict
from contextlib import suppress
from typing import Literal, TypeAlias

from netapply.syscalls import getsockopt
from netapply.values import NamedTuple

Verb: TypeAlias = Literal["read", "change"]

_SO_PEERGROUPS = 59  # asm-generic/socket.h, since Linux 4.13
_CREDENTIALS = struct.Struct("=iII")  # struct ucred
_FEW_GROUPS, _MOST_GROUPS = 64, 65_536  # the latter is NGROUPS_MAX of linux/limits.h
_REMEMBERED = 4096


class Peer(NamedTuple):
    """Who connected, as the agent's user namespace sees it. A client over TCP has uid -1: nobody is known."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]


NOBODY = Peer(0, -1, -1, frozenset())


def peer_of(sock: socket.socket) -> Peer:
    """Who was at the other end of a unix socket when it connected; what he becomes later does not count."""
    if sock.family != socket.AF_UNIX:
        return NOBODY
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Peer(pid, uid, gid, _groups_of(sock))


def _groups_of(sock: socket.socket) -> frozenset[int]:
    for size in (_FEW_GROUPS, _MOST_GROUPS):
        with suppress(OSError):  # there are more, or the kernel is older
            raw = getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, bytes(4 * size))
            return frozenset(group for (group,) in struct.iter_unpack("=I", raw))
    return frozenset()


class Policy(NamedTuple):
    """What one socket allows.

    `owner` (the agent's own user) and root may do everything, unless the socket is `read_only`; members of `readers`
    (a gid, -1 for none) may read. `anybody` may read where the socket itself is the fence: one on loopback.
    """

    owner: int
    readers: int = -1
    read_only: bool = False
    anybody: bool = False

    def refusal(self, peer: Peer, verb: Verb) -> str:
        """Why this is not allowed; "" if it is."""
        trusted = peer.uid in (0, self.owner)
        if verb == "change":
            if self.read_only:
                return "this socket is for reading"
            return "" if trusted else f"only root and uid {self.owner} may change anything, not uid {peer.uid}"
        if trusted or self.anybody or (self.readers >= 0 and self.readers in (peer.groups | {peer.gid})):
            return ""
        return f"uid {peer.uid} is not in the group that may read"


class Quota(NamedTuple):
    """Caps: connections at once, of all and of one user, and requests a second of a user who is not trusted."""

    connections: int = 256
    connections_of_user: int = 64
    requests_per_second: float = 20.0
    burst: float = 60.0


class Meter:
    """Counts clients against a quota. Root is a user like others as to connections: a loop of his starves him alone."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._open: Counter[int] = Counter()
        self._spent: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def enter(self, uid: int) -> bool:
        """A connection begins, if there is room for it."""
        full = self._open.total() >= self._quota.connections
        if full or self._open[uid] >= self._quota.connections_of_user:
            return False
        self._open[uid] += 1
        return True

    def leave(self, uid: int) -> None:
        """A connection that entered has ended."""
        self._open[uid] -= 1
        if not self._open[uid]:
            del self._open[uid]

    def ask(self, uid: int, now: float | None = None) -> float:
        """A request: 0.0 if it may go on, or the seconds after which it may come again."""
        now = time.monotonic() if now is None else now
        rate, burst = self._quota.requests_per_second, self._quota.burst
        spent, at = self._spent.pop(uid, (0.0, now))
        spent = max(0.0, spent - rate * (now - at))
        wait = max(0.0, (spent + 1 - burst) / rate)
        self._spent[uid] = (spent if wait else spent + 1, now)
        if len(self._spent) > _REMEMBERED:
            self._spent.popitem(last=False)
        return wait
