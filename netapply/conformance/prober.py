"""The packet prober: sends the flows of probes all at once and tells what became of each.

    with World() as world, Prober(world) as prober:
        prober.arrange(captures=(15001, 15006, 15053))
        for probe, seen in zip(probes, prober.send(probes)):
            print(difference(probe, seen) or "as expected")

One thread, one epoll loop, no program. Waits are bounded: a flow that should be answered has `PATIENCE` seconds, one
that should be dropped is taken for dropped when nothing more has come for `QUIET` seconds after all others are done.
"""

from __future__ import annotations

import secrets
import select
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Self

from netapply.conformance import raw
from netapply.conformance.case import APP, PROXY, ROOT, Probe, Seen, Sender
from netapply.conformance.clients import Client, Ports, open_clients
from netapply.conformance.listeners import Heard, Listeners, Where
from netapply.conformance.world import World
from netapply.lab.namespaces import timeout_scale
from netapply.values import NamedTuple

PATIENCE, QUIET = 1.5, 0.08
_TOKEN = struct.Struct("!II")  # of which batch, and which of it


class _Engine(NamedTuple):
    """What a prober and its batches share. `scale` is by how much waits are longer."""

    world: World
    epoll: select.epoll
    listeners: Listeners
    ports: Ports
    scale: float


class Prober:
    """Sockets and an event loop for one world; a context manager. `sent` probes took `seconds`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sent, self.seconds = 0, 0.0
        epoll = select.epoll()
        self._engine = _Engine(world, epoll, Listeners(world, epoll), Ports(), timeout_scale())
        self._listeners = self._engine.listeners
        self._captures: tuple[int, ...] = ()
        self._proxy = PROXY
        self._absent: frozenset[int] = frozenset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._engine.listeners.close()
        self._engine.epoll.close()

    def arrange(self, captures: Iterable[int] = (), proxy: Sender = PROXY, absent: Iterable[int] = ()) -> None:
        """The proxy's listeners in the pod: on these ports, its own, and none on those in `absent`."""
        gone = [port for port in self._captures if port not in set(captures)] + [*absent]
        for port in gone:
            self._vacate(port)
        self._captures, self._proxy, self._absent = tuple(captures), proxy, frozenset(absent)

    def send(self, probes: Sequence[Probe]) -> list[Seen]:
        """Send every probe once, all of them at the same time, and see what becomes of each. Raises OSError."""
        begun = time.monotonic()
        with self.open(probes) as batch:
            seen = batch.run()
        # What is late on a busy machine is not lost: only what is silent twice is.
        late = [at for at, probe in enumerate(probes) if seen[at].fate == "silent" and probe.expect.fate != "dropped"]
        if late:
            with self.open([probes[at] for at in late]) as batch:
                for at, each in zip(late, batch.run(), strict=True):
                    seen[at] = each
        self.seconds += time.monotonic() - begun
        return seen

    def open(self, probes: Sequence[Probe]) -> Batch:
        """The same in steps, for connections that are to stay open: `run`, `again` and `close` it."""
        self._listeners.want(self._wanted(probes))
        self.sent += len(probes)
        return Batch(self._engine, probes)

    def fire(self, probes: Sequence[Probe]) -> None:
        """Send the first packet of each probe, and nothing else: nobody answers, so that rules count one packet each.

        Nothing is told of what becomes of them. Not for probes to `absent` ports, which answer by a reset.
        """
        self._listeners.want(self._wanted(probes))
        self._listeners.deafen(on=True)
        try:
            clients = open_clients(self.world, probes, self._engine.ports)
            for client in clients:
                client.start(b"fire")
            for client in clients:
                client.close()
        finally:
            self._listeners.deafen(on=False)
        self.sent += len(probes)

    def _wanted(self, probes: Sequence[Probe]) -> Iterable[tuple[Where, Sender, bool]]:
        """The proxy's ports, and a listener on each side for the port that a probe is for."""
        families = self.world.families
        for port in self._captures:
            if port not in self._absent:
                for family in families:
                    yield Where("pod", family, "tcp", port), self._proxy, True
                    yield Where("pod", family, "udp", port), self._proxy, False
        for probe in probes:
            if probe.state != "new":
                continue
            for port in {probe.port, *([probe.expect.port] if probe.expect.address else [])}:
                yield Where("remote", probe.family, probe.protocol, port), ROOT, False
                if port not in self._captures and port not in self._absent:
                    yield Where("pod", probe.family, probe.protocol, port), APP, False

    def _vacate(self, port: int) -> None:
        for family in self.world.families:
            self._listeners.absent(Where("pod", family, "tcp", port))
            self._listeners.absent(Where("pod", family, "udp", port))


class Batch:
    """Probes that are under way together. Made by `Prober.open`; a context manager."""

    def __init__(self, engine: _Engine, probes: Sequence[Probe]) -> None:
        self.probes = tuple(probes)
        self._world, self._epoll, self._listeners, self._ports, self._scale = engine
        self._clients: dict[int, Client] = {}
        self._by_fd: dict[int, int] = {}
        self._heard: dict[int, Heard] = {}
        self._nonce = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def run(self) -> list[Seen]:
        """Send, and see what becomes of each probe."""
        self._nonce = secrets.randbits(32)
        self._heard.clear()
        plain = [at for at, probe in enumerate(self.probes) if probe.state == "new"]
        opened = open_clients(self._world, [self.probes[at] for at in plain], self._ports)
        self._clients = dict(zip(plain, opened, strict=True))
        for at, client in self._clients.items():
            self._watch(at, client)
        invalid = {at: probe for at, probe in enumerate(self.probes) if probe.state != "new"}
        seen = raw.send_invalid(self._world, invalid, QUIET * self._scale)
        self._loop()
        seen.update({at: self._seen(at, client) for at, client in self._clients.items()})
        return [seen[at] for at in range(len(self.probes))]

    def again(self) -> list[Seen]:
        """Ask once more on the connections and flows that are open, and see who answers now."""
        self._nonce = secrets.randbits(32)
        self._heard.clear()
        for at, client in self._clients.items():
            if client.sock is not None and client.fate == "answered":
                client.fate = "waiting"
                try:
                    client.sock.send(self._token(at))
                except OSError as error:
                    client.failed(error)
        self._loop()
        return [self._seen(at, client) for at, client in sorted(self._clients.items())]

    def close(self) -> None:
        """End all of them by resets."""
        for client in self._clients.values():
            client.close()
        self._by_fd.clear()
        self._listeners.hang_up()

    def _token(self, at: int) -> bytes:
        return _TOKEN.pack(self._nonce, at)

    def _watch(self, at: int, client: Client) -> None:
        client.start(self._token(at))
        if client.sock is not None and client.fate == "waiting":
            self._by_fd[client.sock.fileno()] = at
            self._epoll.register(client.sock.fileno(), select.EPOLLOUT if client.connecting else select.EPOLLIN)

    def _hear(self, token: bytes, heard: Heard) -> bool:
        """Whether it is new: two listeners that answered each other would never end."""
        if len(token) != _TOKEN.size:
            return False
        nonce, at = _TOKEN.unpack(token)
        fresh = nonce == self._nonce and at not in self._heard
        if fresh:
            self._heard[at] = heard
        return fresh

    def _loop(self) -> None:
        begun = last = time.monotonic()
        patience, quiet = PATIENCE * self._scale, QUIET * self._scale
        while True:
            waiting = [client for client in self._clients.values() if client.fate == "waiting"]
            expected = any(client.probe.expect.fate != "dropped" for client in waiting)
            until = begun + patience if expected else last + quiet
            left = until - time.monotonic()
            events = self._epoll.poll(max(left, 0)) if waiting else []
            if not waiting or (not events and left <= 0):
                return
            if events:
                last = time.monotonic()
            for fd, _ in events:
                self._ready(fd)

    def _ready(self, fd: int) -> None:
        if self._listeners.ready(fd, self._hear):
            return
        at = self._by_fd.get(fd)
        if at is None:
            return
        client = self._clients[at]
        connecting = client.connecting
        client.ready(self._token(at))
        if client.sock is None or client.fate in ("refused", "failed", "denied"):
            self._epoll.unregister(fd)
            del self._by_fd[fd]
        elif connecting and not client.connecting:
            self._epoll.modify(fd, select.EPOLLIN)

    def _seen(self, at: int, client: Client) -> Seen:
        heard = self._heard.get(at)
        if client.fate == "refused":
            return Seen("refused", client=client.name)
        if heard is None:
            if client.fate in ("waiting", "denied"):
                return Seen("silent", client=client.name)
            return Seen("failed", client=client.name, error=client.error)
        where, local, peer, original = heard
        known = (where.place, where.port, local, original, peer, client.name, client.error)
        return Seen("answered", *known) if client.fate == "answered" else Seen("unanswered", *known)
