"""What a backend sends to the kernel to change it, kept as bytes: the requests that the floor is made of."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

from netapply.api import Capture
from netapply.journal import Journal
from netapply.kernel import NETLINK_NETFILTER, NETLINK_ROUTE, NetlinkProtocol, Scratch
from netapply.namespace import Namespace
from netapply.plan import CapturePlan
from netapply.ruleset import Family

T = TypeVar("T")

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_BEGIN, _END = 0x10, 0x11  # NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END
_IPSET = 6  # NFNL_SUBSYS_IPSET
_IPSET_CHANGES = {2, 3, 9, 10}  # enum ipset_cmd: CREATE, DESTROY, ADD, DEL
_BARE = 20  # nlmsghdr and nfgenmsg: a batch begin without NFNL_BATCH_GENID


class Message(NamedTuple):
    """One netlink request, without the generation that it was made for."""

    protocol: NetlinkProtocol
    data: bytes


class Option(NamedTuple):
    """One setsockopt(2) on an inet socket; `scratch` is where the address of a result buffer goes."""

    family: Family
    option: int
    blob: bytes
    scratch: Scratch | None


Request: TypeAlias = Message | Option


class Cycle(NamedTuple):
    """The requests of one round: apply, then the update, then clean."""

    apply: tuple[Request, ...]
    update: tuple[Request, ...]
    clean: tuple[Request, ...]


class Recorder(Namespace):
    """A namespace that keeps what changes it. Reads pass unseen."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]  # handed on as they are
        self.requests: list[Request] = []

    def taken(self) -> tuple[Request, ...]:
        """What was sent since the last time."""
        requests, self.requests = tuple(self.requests), []
        return requests

    def netlink(self, protocol: NetlinkProtocol, request: bytes) -> list[bytes]:
        """See `netapply.kernel.Kernel.netlink`."""
        answer = super().netlink(protocol, request)
        if _changes(protocol, request):
            self.requests.append(Message(protocol, _without_generation(request)))
        return answer

    def setsockopt(self, family: Family, option: int, blob: bytes, scratch: Scratch | None = None) -> bytes:
        """See `netapply.kernel.Kernel.setsockopt`."""
        answer = super().setsockopt(family, option, blob, scratch)
        self.requests.append(Option(family, option, blob, scratch))
        return answer

    def inside(self, work: Callable[[], T]) -> T:
        """Refused: what a library sends by sockets of its own is not seen here."""
        raise NotImplementedError("a plan that needs pyroute2 cannot be recorded")


def record(fd: int, state: str, backend: str, first: CapturePlan, second: CapturePlan) -> Cycle:
    """What our backend sends in the namespace behind `fd`, which is as it was afterwards.

    The first round creates what no later one has to (tables of iptables-legacy); the second one is returned.
    """
    with Recorder.open(fd) as namespace:
        if not isinstance(namespace, Recorder):
            raise TypeError(namespace)
        capture = Capture(namespace, Journal(state))
        return [_cycle(namespace, capture, backend, first, second) for _ in range(2)][1]


def _cycle(recorder: Recorder, capture: Capture, backend: str, first: CapturePlan, second: CapturePlan) -> Cycle:
    capture.apply(first, backend=backend)
    apply = recorder.taken()
    capture.apply(second, backend=backend)
    update = recorder.taken()
    capture.clean(backend=backend)
    return Cycle(apply, update, recorder.taken())


def _changes(protocol: NetlinkProtocol, request: bytes) -> bool:
    """Whether it is a request that changes something: no dump, no question, no batch that is only checked."""
    kind: int = _HEADER.unpack_from(request)[1]
    if protocol == NETLINK_ROUTE:
        return kind & 3 < 2  # linux/rtnetlink.h: each kind of object has NEW, DEL, GET, SET, from 16
    if protocol != NETLINK_NETFILTER:
        return False
    if kind == _BEGIN:
        return _HEADER.unpack_from(request, len(request) - _BARE)[:2] == (_BARE, _END)
    return kind >> 8 == _IPSET and kind & 0xFF in _IPSET_CHANGES


def _without_generation(request: bytes) -> bytes:
    length, kind, flags, sequence, port = _HEADER.unpack_from(request)
    if kind != _BEGIN or length == _BARE:
        return request
    head = _HEADER.pack(_BARE, kind, flags, sequence, port)
    return head + request[_HEADER.size : _BARE] + request[(length + 3) & ~3 :]
