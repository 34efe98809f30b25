"""The connections by which the caller is logged in here, and a plan that leaves them alone, for as long as it is tried.

What could cut somebody off who changes the rules of the machine that he is logged in to:

- A connection that is there: its packets open nothing, so the default layout never captures them. Istio's layouts may,
  in hook output, if connection tracking sees it for the first time; TPROXY's mark brings its packets to `lo`, and
  `invalid: drop` drops them where connection tracking takes up nothing in its middle (nf_conntrack_tcp_loose = 0).
- A new one, when that is broken: it is captured, or dropped, as any that comes in is.

So the port by which he came is excluded from inbound capture, his address from outbound capture in Istio's layouts,
ours from interfaces that are rerouted, and invalid packets are kept. All that in the plan's own words: `show`,
`explain` and `verify` see it as any other exclusion.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from netapply.existing import Connection, connections
from netapply.kernel import Kernel
from netapply.plan import CapturePlan, in_each_family
from netapply.ruleset import Cidr, PortRange
from netapply.spans import collapse, merge
from netapply.values import NamedTuple

#: Names of the processes that hold a login's connection open (comm, proc(5)).
_SERVERS = ("sshd", "dropbear")
#: Processes between the caller and the first one, at most.
_DEPTH = 64


class Login(NamedTuple):
    """Packed addresses of the far end and of ours, and our port."""

    far: bytes
    here: bytes
    port: int


def find_logins(kernel: Kernel) -> tuple[Login, ...]:
    """Those of the caller's that come in through this namespace; () where he came otherwise. Raises KernelError.

    By SSH_CONNECTION, as sshd(8) sets it, in the environment of the caller or of an ancestor, where sudo(8) has removed
    it; and by the sockets of the sshd that is an ancestor.
    """
    told, inodes = set[tuple[bytes, int, bytes, int]](), set[int]()
    _note(told, os.environ.get("SSH_CONNECTION", ""))
    for pid, name in _ancestors():
        _note(told, _said_to(pid))
        if name.startswith(_SERVERS):
            inodes.update(_sockets_of(pid))
    if not told and not inodes:
        return ()
    found = (each for each in connections(kernel) if each.inode in inodes or _ends(each) in told)
    return tuple(dict.fromkeys(Login(each.far, each.here, each.port) for each in found))


def write_login(login: Login) -> str:
    """As a word: `read_login` reads it."""
    return f"{_written(login.far)},{_written(login.here)},{login.port}"


def read_login(text: str) -> Login | None:
    """The login of a word; None where it is none."""
    try:
        far, here, port = text.split(",")
        found = Login(_packed(far), _packed(here), int(port))
    except (ValueError, OSError):
        return None
    return found if len(found.far) == len(found.here) and 0 < found.port < 1 << 16 else None


def told_of(login: Login) -> str:
    """What there is to say of one while a plan is tried."""
    far = _written(login.far)
    return f"you are logged in from {far}: connections to port {login.port} are left alone until it is confirmed"


def spare(plan: CapturePlan, logins: Iterable[Login], layout: str) -> CapturePlan:
    """The plan that leaves these alone, and new connections to the same port. Pure."""
    each = tuple(logins)
    return in_each_family(plan, lambda part: _spare(part, each, istio=layout != "netapply")) if each else plan


def _spare(plan: CapturePlan, logins: tuple[Login, ...], *, istio: bool) -> CapturePlan:
    inbound, cidrs = plan.inbound, plan.outbound.cidrs
    ports = tuple(PortRange(each.port, each.port) for each in logins)
    spared: dict[str, Any] = {"exclude": merge((*inbound.ports.exclude, *ports))}
    if istio and inbound.ports.include != "*":  # Istio has no exclusion beside a list
        spared = {"include": tuple(_without(inbound.ports.include, ports))}
    if inbound.mode != "none":
        inbound = inbound._replace(ports=inbound.ports._replace(**spared))
    elsewhere = cidrs._replace(exclude=_and(cidrs.exclude, [each.far for each in logins])) if istio else cidrs
    here = [] if istio else [each.here for each in logins]  # nor one of destinations of what is rerouted
    rerouted = tuple(
        each._replace(exclude=_and(cidrs.exclude if each.exclude is None else each.exclude, here))
        for each in plan.interfaces.reroute
    )
    return plan._replace(
        inbound=inbound,
        outbound=plan.outbound._replace(cidrs=elsewhere),
        interfaces=plan.interfaces._replace(reroute=rerouted),
        invalid="keep",
    )


def _and(blocks: tuple[Cidr, ...], addresses: list[bytes]) -> tuple[Cidr, ...]:
    return collapse((*blocks, *(Cidr(packed, len(packed) * 8) for packed in addresses))) if addresses else blocks


def _without(ranges: tuple[PortRange, ...], ports: tuple[PortRange, ...]) -> Iterator[PortRange]:
    for first, last in ranges:
        at = first
        for port in sorted({port for port, _ in ports if first <= port <= last}):
            if at < port:
                yield PortRange(at, port - 1)
            at = port + 1
        if at <= last:
            yield PortRange(at, last)


def _ends(found: Connection) -> tuple[bytes, int, bytes, int]:
    return found.far, found.far_port, found.here, found.port


def _note(told: set[tuple[bytes, int, bytes, int]], said: str) -> None:
    """What SSH_CONNECTION says, if it says it: the far address and port, and ours."""
    with suppress(ValueError, OSError):
        far, far_port, here, port = said.split()
        told.add((_packed(far), int(far_port), _packed(here), int(port)))


def _packed(address: str) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_pton(family, address.partition("%")[0])


def _written(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6 if len(packed) == 16 else socket.AF_INET, packed)


def _ancestors() -> Iterator[tuple[int, str]]:
    """Process ids and names, the nearest first, as far as /proc shows them."""
    pid = os.getppid()
    for _ in range(_DEPTH):
        if pid < 1:
            return
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                head, _, rest = file.read().rpartition(")")
        except OSError:
            return
        yield pid, head.partition("(")[2]
        pid = int(rest.split()[1])


def _said_to(pid: int) -> str:
    """SSH_CONNECTION in the environment of a process; "" where it has none, or we may not look."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = file.read().split(b"\0")
    except OSError:
        return ""
    found = (each for each in variables if each.startswith(b"SSH_CONNECTION="))
    return next(found, b"=").partition(b"=")[2].decode("ascii", "replace")


def _sockets_of(pid: int) -> Iterator[int]:
    """The inodes of the sockets that a process has open; none where we may not look."""
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError, ValueError):
                kind, _, inode = os.readlink(f"/proc/{pid}/fd/{name}").partition(":[")
                if kind == "socket":
                    yield int(inode.rstrip("]"))
