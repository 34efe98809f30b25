"""Canaries: a connection of each kind through the rules that stand, and who answered it. `verify --probe` and others.

A network device of our own (TUN, linux/if_tun.h) is put up in the namespace for as long as it takes: what leaves by it
comes to us, and what we write to it comes in from elsewhere. So nothing is sent to anybody, no answer has to be waited
for, and what the plan leaves alone is seen as surely as what it captures. Its addresses are for documentation
(RFC 5737, RFC 3849). Where the proxy does not listen, a listener of ours stands in for it.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal, TypeAlias

from netapply.decide import decide
from netapply.errors import KernelError, ValidationError
from netapply.flow import TCP, UDP, Decision, Flow
from netapply.namespace import Namespace
from netapply.plan import CapturePlan
from netapply.syscalls import set_filesystem_ids
from netapply.tun import Ends, Tun, is_of, opening, packed, refusal
from netapply.values import NamedTuple

#: Seconds in which the kernel delivers a packet to a socket of the same machine; more than enough.
PATIENCE = 1.0
_TRANSPARENT = {4: (0, 19), 6: (41, 75)}  # level and option: IP_TRANSPARENT, IPV6_TRANSPARENT
#: Who calls: the first whose calls the plan captures.
_STRANGERS = ((65534, 65534), (1000, 1000), (0, 0))

Kind: TypeAlias = Literal["outbound", "proxy", "dns", "inbound"]
Fate: TypeAlias = Literal["captured", "passed", "refused", "lost"]


class Canary(NamedTuple):
    """One connection: what the plan says of it, and what became of it.

    `answered_by` is "the proxy" (whoever listens on its port), "a listener of ours", "the world" or "nobody".
    """

    kind: Kind
    family: int
    expected: Decision
    fate: Fate
    answered_by: str

    @property
    def right(self) -> bool:
        """Whether it went where the plan says."""
        captured = self.expected.verdict not in ("bypass", "drop")
        lost = self.expected.verdict == "drop"
        return self.fate == ("captured" if captured else "lost" if lost else "passed")

    def __str__(self) -> str:
        port = f" to port {self.expected.port}" if self.expected.port else ""
        return (
            f"{self.kind} ip{'6' if self.family == 6 else ''}: by the plan {self.expected.verdict}{port}, "
            f"{self.fate}, answered by {self.answered_by}"
        )


def send_canaries(namespace: Namespace, plan: CapturePlan) -> tuple[Canary, ...]:
    """A connection of each kind in each family. Raises KernelError where there can be no device of ours."""
    return namespace.inside(lambda: _send_all(plan))


def prove(namespace: Namespace, plan: CapturePlan) -> tuple[Canary, ...]:
    """The same, all of which went where the plan says. Raises ValidationError, exit code 126."""
    sent = send_canaries(namespace, plan)
    wrong = [str(each) for each in sent if not each.right]
    if wrong:
        raise ValidationError(
            f"{len(wrong)} of {len(sent)} connections did not go where the plan says: " + "; ".join(wrong),
            next_step="netapply verify PLAN tells which rules of ours differ, netapply explain which one decides, and "
            "netapply show --all whether somebody else's come first",
        )
    return sent


_WITHOUT_TUN = "it takes /dev/net/tun and CAP_NET_ADMIN; from outside of the container there are both"
_LO_IS_DOWN = "bring lo up in the namespace (ip link set lo up): nothing goes anywhere there, so nothing can be proven"


def _send_all(plan: CapturePlan) -> tuple[Canary, ...]:
    try:
        with Tun() as tun:
            return tuple(canary for ends in tun.put_up() for canary in _send(plan, tun, ends))
    except OSError as error:
        raise KernelError(
            "put up a TUN device for canary connections",
            error.errno or 0,
            next_step=_LO_IS_DOWN if error.errno == errno.ENETUNREACH else _WITHOUT_TUN,
        ) from error


def _send(plan: CapturePlan, tun: Tun, ends: Ends) -> Iterator[Canary]:
    source, far = packed(ends.own), packed(ends.far)

    def outbound(protocol: int, dport: int, uid: int, gid: int) -> Flow:
        return Flow("outbound", protocol, source, far, 0, dport, tun.name, uid, gid)

    ports = (80, 443, 8080, *(20000 + secrets.randbelow(20000) for _ in range(3)))
    calls = [outbound(TCP, port, *who) for who in _STRANGERS for port in ports]
    yield _call(plan, tun, ends, "outbound", _captured_first(plan, calls))
    uid = next(iter(plan.proxy.uids), 0)
    gid = next(iter(plan.proxy.gids), uid)
    yield _call(plan, tun, ends, "proxy", outbound(TCP, 80, uid, gid))
    if plan.dns.capture == "all":
        yield _call(plan, tun, ends, "dns", _captured_first(plan, [outbound(UDP, 53, *who) for who in _STRANGERS]))
    if plan.inbound.mode != "none":
        yield _come_in(plan, tun, ends)


def _captured_first(plan: CapturePlan, flows: list[Flow]) -> Flow:
    return next((flow for flow in flows if decide(plan, flow).verdict not in ("bypass", "drop")), flows[0])


def _call(plan: CapturePlan, tun: Tun, ends: Ends, kind: Kind, flow: Flow) -> Canary:
    """Somebody in the namespace calls out."""
    decision = decide(plan, flow)
    with (
        _listener(ends, decision, flow.protocol, transparent=False) as listener,
        _acting_as(flow.uid, flow.gid),
        _socket(ends, flow.protocol) as caller,
    ):
        caller.bind((ends.own, 0))
        caller.setblocking(False)
        tun.drain()
        with suppress(BlockingIOError):
            caller.connect((ends.far, flow.dport))
        if flow.protocol == UDP:
            caller.send(b"\0" * 12)
        fate = _watch(tun, ends, flow, caller, listener)
    return Canary(kind, ends.family, decision, fate, _who(fate, listener))


def _watch(tun: Tun, ends: Ends, flow: Flow, caller: socket.socket, listener: socket.socket | None) -> Fate:
    deadline = time.monotonic() + PATIENCE
    tcp = flow.protocol == TCP
    while (left := deadline - time.monotonic()) > 0:
        heard = [] if tcp else [sock.fileno() for sock in (caller, listener) if sock is not None]
        readable, writable, _ = select.select([tun.fd, *heard], [caller.fileno()] if tcp else [], [], left)
        if tun.fd in readable and any(is_of(packet, ends, flow.protocol, flow.dport) for packet in tun.drain()):
            return "passed"
        if writable:
            number = caller.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return "captured" if number == 0 else "refused" if number == errno.ECONNREFUSED else "lost"
        if not {*heard}.isdisjoint(readable):
            return "captured"
    # A query that a server of the proxy's has, and has no answer to: all that is known is that it did not go out.
    return "captured" if not tcp and listener is None else "lost"


def _come_in(plan: CapturePlan, tun: Tun, ends: Ends) -> Canary:
    """Somebody elsewhere calls a port on which nobody listens: an answer can only be the proxy's."""
    ports = [*(20000 + secrets.randbelow(20000) for _ in range(3)), 80, 8080]
    if plan.inbound.ports.include != "*":
        ports += [each.first for each in plan.inbound.ports.include]
    free = [port for port in ports if _is_free(ends, port)] or ports[:1]
    sport = 40000 + secrets.randbelow(20000)
    source, own = packed(ends.far), packed(ends.own)
    flow = _captured_first(plan, [Flow("inbound", TCP, source, own, sport, port, tun.name) for port in free])
    decision = decide(plan, flow)
    with _listener(ends, decision, TCP, transparent=decision.verdict == "tproxy") as listener:
        tun.drain()
        os.write(tun.fd, opening(ends, sport, flow.dport))
        fate: Fate = "lost"
        deadline = time.monotonic() + PATIENCE
        while fate == "lost" and (left := deadline - time.monotonic()) > 0:
            select.select([tun.fd], [], [], left)
            for packet in tun.drain():
                if is_of(packet, ends, TCP, sport) and (flags := packet[ends.header + 13]):
                    fate = "captured" if flags & 0x12 == 0x12 else "passed"  # SYN and ACK; else RST: nobody is there
                    if fate == "captured":
                        os.write(tun.fd, refusal(ends, packet, sport, flow.dport))
    answered_by = "nobody, as nobody listens there" if fate == "passed" else _who(fate, listener)
    return Canary("inbound", ends.family, decision, fate, answered_by)


def _who(fate: Fate, listener: socket.socket | None) -> str:
    if fate == "captured":
        return "the proxy" if listener is None else "a listener of ours"
    return "the world" if fate == "passed" else "nobody"


@contextmanager
def _listener(ends: Ends, decision: Decision, protocol: int, *, transparent: bool) -> Generator[socket.socket | None]:
    """In the proxy's place, where nobody listens."""
    with ExitStack() as stack:
        listener: socket.socket | None = None
        if decision.port:
            made = stack.enter_context(_socket(ends, protocol))
            try:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if transparent:
                    made.setsockopt(*_TRANSPARENT[ends.family], 1)
                made.bind(("", decision.port))
                if protocol == TCP:
                    made.listen()
                listener = made
            except OSError as error:
                made.close()
                if error.errno != errno.EADDRINUSE:
                    raise
        yield listener


def _is_free(ends: Ends, port: int) -> bool:
    with _socket(ends, TCP) as sock, suppress(OSError):
        sock.bind(("", port))
        return True
    return False


def _socket(ends: Ends, protocol: int) -> socket.socket:
    family = socket.AF_INET6 if ends.family == 6 else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM if protocol == TCP else socket.SOCK_DGRAM)
    if ends.family == 6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


@contextmanager
def _acting_as(uid: int, gid: int) -> Generator[None]:
    """What this thread opens meanwhile belongs to these; without the right to, to whom it belongs anyway."""
    before = os.geteuid(), os.getegid()
    try:
        set_filesystem_ids(uid, gid)
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        set_filesystem_ids(*before)
