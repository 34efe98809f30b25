"""The service manager above us, as sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3) describe it.

A few lines of our own: what is passed in, what is told, and which descriptors are parked for the next process.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Protocol

from netapply.agent.events import Event
from netapply.agent.model import Metrics
from netapply.values import NamedTuple

_FIRST = 3  # SD_LISTEN_FDS_START of systemd/sd-daemon.h
_SOCKETS = frozenset(("control", "read", "metrics"))
#: How often is looked for what changed, in seconds, where the watchdog does not want it oftener.
_PERIOD = 1.0
#: What parks a namespace's descriptor is called so, and then as `Agent.descriptors` calls it.
_KEPT = "netns."


class Passed(NamedTuple):
    """Descriptors that the manager passed in: sockets by name, and namespaces by key."""

    sockets: Mapping[str, socket.socket]
    namespaces: Mapping[str, int]


def take_passed(environment: MutableMapping[str, str]) -> Passed:
    """What was passed to this process; all is ours from now on, and nobody who inherits the environment takes it.

    A name that nobody knows is closed: the socket unit says `FileDescriptorName=` control, read or metrics.
    """
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    pid, number = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "0")
    sockets: dict[str, socket.socket] = {}
    namespaces: dict[str, int] = {}
    if pid != str(os.getpid()) or not number.isdigit():
        return Passed(sockets, namespaces)
    for index in range(int(number)):
        fd, name = _FIRST + index, names[index] if index < len(names) else ""
        os.set_inheritable(fd, False)
        if name in _SOCKETS and name not in sockets:
            sockets[name] = socket.socket(fileno=fd)
        elif name.startswith(_KEPT):
            namespaces[name.removeprefix(_KEPT)] = fd
        else:
            os.close(fd)
    return Passed(sockets, namespaces)


class Watched(Protocol):
    """What is told of an agent."""

    def metrics(self) -> Metrics: ...
    def descriptors(self) -> Mapping[str, int]: ...
    def events(self) -> AsyncIterator[Event]: ...


class Manager:
    """Tells the manager that started this process what becomes of an agent; without one (no NOTIFY_SOCKET) nobody.

    `parked` are the descriptors that it has and passed in: they are closed once the agent has its own of them.
    """

    def __init__(self, environment: MutableMapping[str, str], parked: Mapping[str, int]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        period, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        #: In seconds, 0.0 for none.
        self.watchdog = int(period) / 1e6 if period.isdigit() and pid in ("", str(os.getpid())) else 0.0
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._parked = frozenset(parked)
        self._passed = list(parked.values())
        self._fed = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    def started(self, agent: Watched, _: object = None) -> None:
        """The agent is ready: say so, and go on telling until the loop ends. For `serve`."""
        while self._passed:
            os.close(self._passed.pop())
        if self._address:
            self._park(agent)
            self.tell("READY=1", status=_status(agent))
            self._tasks = [asyncio.create_task(self._go_on(agent)), asyncio.create_task(self._follow(agent))]

    async def _go_on(self, agent: Watched) -> None:
        period = min(_PERIOD, self.watchdog / 4) if self.watchdog else _PERIOD
        said = ""
        while True:
            self._feed(agent)
            self._park(agent)
            status = _status(agent)
            if status != said:
                said = status
                self.tell(status=status)
            await asyncio.sleep(period)

    async def _follow(self, agent: Watched) -> None:
        """Park what was applied at once: whoever is killed in the next moment must find it again."""
        async for event in agent.events():
            if event.kind == "applied":
                self._park(agent)

    def _feed(self, agent: Watched) -> None:
        """Feed the watchdog if the reconcile loop came round since it was fed last."""
        ticked = agent.metrics().ticked
        if self.watchdog and ticked > self._fed:
            self._fed = ticked
            self.tell("WATCHDOG=1")

    def _park(self, agent: Watched) -> None:
        """Give the manager a copy of each descriptor that it has not got, and have it close those of the past."""
        descriptors = agent.descriptors()
        for key in self._parked - descriptors.keys():
            self.tell("FDSTOREREMOVE=1", f"FDNAME={_KEPT}{key}")
        for key in descriptors.keys() - self._parked:
            self.tell("FDSTORE=1", "FDPOLL=0", f"FDNAME={_KEPT}{key}", fd=descriptors[key])
        self._parked = frozenset(descriptors)

    def tell(self, *words: str, status: str = "", fd: int = -1) -> None:
        """Send one message, with a descriptor if there is one. Nobody listening is no error."""
        if not self._address:
            return
        lines = [*words, *([f"STATUS={status}"] if status else [])]
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1.0)  # a manager that does not read must not hold us up
            sock.connect(self._address)
            socket.send_fds(sock, ["\n".join(lines).encode()], [fd] if fd >= 0 else [])


def _status(agent: Watched) -> str:
    """A line for `systemctl status`."""
    states = {state: count for state, count in agent.metrics().namespaces.items() if count}
    return ", ".join(f"{count} {state}" for state, count in states.items()) or "no namespaces yet"
