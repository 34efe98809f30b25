"""The seam: every system call that reads or changes netfilter, routing or settings goes through a `Kernel`.

`netapply.namespace.Namespace` is the real one, bound to one network namespace. Nothing else in the product
talks to the kernel about the network, so this is where tests inject faults, and where a reader looks to see
all that can happen to a namespace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias, TypeVar

from netapply.ruleset import Family
from netapply.values import NamedTuple

T = TypeVar("T")

#: Netlink protocol numbers of linux/netlink.h.
NetlinkProtocol: TypeAlias = Literal[0, 4, 12]
NETLINK_ROUTE: NetlinkProtocol = 0
NETLINK_SOCK_DIAG: NetlinkProtocol = 4
NETLINK_NETFILTER: NetlinkProtocol = 12


class Scratch(NamedTuple):
    """A buffer that the kernel writes to in setsockopt(2): `size` bytes; their address goes to `offset` of the blob."""

    offset: int
    size: int


class Kernel(Protocol):
    """One network namespace, as the kernel shows it. Sockets are opened there once, kept, and closed late."""

    @property
    def lock_timeout(self) -> float:
        """Seconds to wait for the xtables lock."""
        ...

    @property
    def memory(self) -> dict[str, object]:
        """What is remembered of this namespace, each value under a name of its own, for as long as it is open.

        A value is replaced, never changed, so any thread may take it; whoever does proves by the kernel that it
        still holds. A kernel may also remember nothing, as this one.
        """
        return {}

    def netlink(self, protocol: NetlinkProtocol, request: bytes) -> list[bytes]:
        """Send one request (a dump, a get, or a whole nfnetlink batch) and return every datagram of the answer.

        A batch is handled inside sendmsg, so its answers are drained without waiting; a dump is read until
        NLMSG_DONE, under a deadline. Only messages of the kernel (port id 0) are returned. Raises OSError
        (ENOBUFS where answers were lost).
        """
        ...

    def getsockopt(self, family: Family, option: int, buffer: bytes, level: int | None = None) -> bytes:
        """getsockopt(2) with `buffer` as input and output, on an inet socket; level SOL_IP or SOL_IPV6 by default."""
        ...

    def setsockopt(self, family: Family, option: int, blob: bytes, scratch: Scratch | None = None) -> bytes:
        """setsockopt(2) on an inet socket; returns what the kernel wrote to the scratch buffer (b"" without one)."""
        ...

    def read_file(self, path: str) -> str:
        """A file under /proc/net (as "net/NAME") or /proc/sys (as "sys/NAME") of this namespace. Raises OSError."""
        ...

    def write_file(self, path: str, value: str) -> None:
        """Write one under /proc/sys, as "sys/NAME". Raises OSError."""
        ...

    def inside(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread that is in the namespace: for libraries that open sockets of their own."""
        ...
