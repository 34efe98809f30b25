"""The senders of probes: sockets of whoever a probe says, connecting and asking without ever waiting."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from itertools import groupby
from typing import Literal, TypeAlias

from netapply.conformance import cgroups
from netapply.conformance.case import Endpoint, Probe
from netapply.conformance.world import AF, BY_DEVICE, World, acting_as, endpoint, is_local, source_of
from netapply.lab.actors import SO_MARK, bind_anywhere, set_transparent

#: What became of a client: on its way, or what it was told.
ClientFate: TypeAlias = Literal["waiting", "answered", "refused", "denied", "failed"]
PORTS = (20000, 32000)  # source ports, one after the other: conntrack must not know them from before
SO_LINGER_NOW = b"\1\0\0\0\0\0\0\0"  # socket(7): close with a reset, and keep nothing


class Client:
    """One probe's socket. `fate` and `error` tell how far it got; `name` is its own address and port."""

    def __init__(self, probe: Probe, sock: socket.socket | None, error: str = "") -> None:
        self.probe = probe
        self.sock = sock
        self.fate: ClientFate = "failed" if sock is None else "waiting"
        self.error = error
        self.name: Endpoint = ("", 0)
        self.connecting = probe.protocol == "tcp"

    def start(self, token: bytes) -> None:
        """Send the first packet: a SYN, or the datagram."""
        if self.sock is None:
            return
        try:
            number = self.sock.connect_ex((self.probe.to, self.probe.port))
            if number not in (0, errno.EINPROGRESS):
                self.failed(OSError(number, errno.errorcode.get(number, "")))
                return
            self.name = endpoint(self.sock.getsockname())
            if not self.connecting:
                self.sock.send(token)
        except OSError as error:
            self.failed(error)

    def ready(self, token: bytes) -> None:
        """The socket has something to say."""
        if self.sock is None:
            return
        try:
            if self.connecting:
                number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    self.failed(OSError(number, errno.errorcode.get(number, "")))
                    return
                self.connecting = False
                self.name = endpoint(self.sock.getsockname())
                self.sock.send(token)
                return
            said = self.sock.recv(64)
            if said == token:
                self.fate = "answered"
            elif not said:
                self.fate, self.error = "failed", "closed without an answer"
        except BlockingIOError:
            return
        except OSError as error:
            self.failed(error)

    def failed(self, error: OSError) -> None:
        """A refusal and a denial are answers; all else is a failure."""
        self.fate = (
            "refused" if error.errno == errno.ECONNREFUSED else "denied" if error.errno == errno.EPERM else "failed"
        )
        self.error = "" if self.fate == "refused" else errno.errorcode.get(error.errno or 0, str(error))

    def close(self) -> None:
        """End the connection by a reset."""
        if self.sock is None:
            return
        if self.probe.protocol == "tcp":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SO_LINGER_NOW)
        self.sock.close()
        self.sock = None


class Ports:
    """Source ports in turn."""

    def __init__(self) -> None:
        self._next = PORTS[0]

    def take(self) -> int:
        """The next one."""
        self._next = self._next + 1 if self._next < PORTS[1] else PORTS[0]
        return self._next


def open_clients(world: World, probes: Iterable[Probe], ports: Ports) -> list[Client]:
    """A client for each probe, in order, with the socket bound and nothing sent."""
    # Ports are given out here: what a fork takes would be taken again.
    bound = ((at, probe if probe.sport else probe._replace(sport=ports.take())) for at, probe in enumerate(probes))
    numbered = sorted(bound, key=lambda each: _whose(each[1]))
    clients: dict[int, Client] = {}
    for (origin, cgroup), group in groupby(numbered, key=lambda each: _whose(each[1])[:2]):
        members = list(group)
        sockets = _opened(world, origin, cgroup, [probe for _, probe in members])
        for (index, probe), found in zip(members, sockets, strict=True):
            sock, error = (found, "") if isinstance(found, socket.socket) else (None, str(found))
            clients[index] = Client(probe, sock, error)
    return [clients[index] for index in sorted(clients)]


def _whose(probe: Probe) -> tuple[Literal["pod", "remote"], str, tuple[object, ...]]:
    return probe.origin, probe.sender.cgroup, tuple(probe.sender[:3])


def _opened(
    world: World, origin: Literal["pod", "remote"], cgroup: str, probes: list[Probe]
) -> list[socket.socket | OSError]:
    """Sockets of senders in one cgroup, or why there is none."""

    def work() -> list[socket.socket | OSError]:
        found: list[socket.socket | OSError] = []
        for sender, group in groupby(probes, key=lambda probe: probe.sender):
            with acting_as(sender):
                found += [_bound(probe) for probe in group]
        return found

    place = world.place(origin)
    if not cgroup:
        return place.inside(work)

    def all_of_them() -> list[socket.socket]:
        found = work()
        wrong = next((each for each in found if isinstance(each, OSError)), None)
        if wrong is not None:
            raise wrong
        return [each for each in found if isinstance(each, socket.socket)]

    try:
        return [*place.inside(lambda: cgroups.opened_in(cgroup, all_of_them))]
    except OSError as error:
        return [error] * len(probes)


def _bound(probe: Probe) -> socket.socket | OSError:
    kind = socket.SOCK_STREAM if probe.protocol == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(AF[probe.family], kind)
    try:
        sock.settimeout(0)
        mark = BY_DEVICE[probe.device].mark if probe.origin == "remote" else probe.mark
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
        _bind(sock, probe)
        if probe.protocol == "udp":  # at once: until then it takes what is for a listener on its port
            sock.connect((probe.to, probe.port))
    except OSError as error:
        sock.close()
        return error
    return sock


def _bind(sock: socket.socket, probe: Probe) -> None:
    source = source_of(probe) or ("::" if probe.family == "ip6" else "0.0.0.0")  # noqa: S104 - any address is meant
    if probe.origin == "pod" and probe.source and not is_local(probe.source):
        set_transparent(sock)  # an address that is nobody's here
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bind_anywhere(sock, (source, probe.sport))
