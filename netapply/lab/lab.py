"""The lab: a pod and a remote side, their services, and probes. One event loop serves them all."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, Self

from netapply.errors import NamespaceError
from netapply.lab import dns, flows, probes
from netapply.lab.actors import ACTORS, Actor, Identity
from netapply.lab.answers import Answer, Endpoint
from netapply.lab.namespaces import Place, lab_names, sweep
from netapply.lab.network import ADDRESSES, connect
from netapply.lab.proxy import INBOUND, OUTBOUND, Proxy
from netapply.lab.services import Services, endpoint
from netapply.ruleset import Family

DNS_PORT, DNS_PROXY_PORT = 53, 15053
REMOTE_PORTS = (flows.SERVICE_PORT, 443, 8080, 9090)
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Lab:
    """Two throwaway namespaces with real services in them; an async context manager. It installs no rules.

    `proxy` is whom the proxy's sockets belong to; Istio runs it as uid 0, gid 1337 where inbound is TPROXY, and its
    rules for that lead a proxy of uid 1337 back to itself. `keep` leaves the two namespaces behind, under /run/netns;
    what answers in them ends with the lab all the same. While it stands, SIGTERM and SIGHUP (where nobody else handles
    them) and SIGINT (by asyncio.run) cancel the task that entered it, so that it is torn down; SystemExit follows.
    Raises NamespaceError where the process may not create namespaces.
    """

    pod: Place
    remote: Place
    families: tuple[Family, ...]

    def __init__(self, *, proxy: Identity = ACTORS["proxy"][1], keep: bool = False) -> None:
        self._proxy_identity = proxy
        self._keep = keep
        self._stack = ExitStack()
        self._terminated_by = 0

    async def __aenter__(self) -> Self:
        sweep()
        try:
            self._catch_signals()
            pod, remote = lab_names(("pod", "remote"), keep=self._keep)
            self.pod = self._stack.enter_context(Place(pod, keep=self._keep))
            self.remote = self._stack.enter_context(Place(remote, keep=self._keep))
            self.families = connect(self.pod, self.remote)
            self._services = Services()
            for family in self.families:
                self._populate(family)
        except BaseException as error:
            await self._close()
            if isinstance(error, OSError):
                raise NamespaceError(f"the services of the lab: {error}", next_step="run it as root") from error
            raise
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._close()
        if self._terminated_by:
            raise SystemExit(128 + self._terminated_by)

    # --- who is there ----------------------------------------------------------------------------------------

    def actor(self, name: str, *, uid: int | None = None, gid: int | None = None) -> Actor:
        """Somebody of `ACTORS`, with another uid or gid if given. Raises KeyError."""
        side, own = ACTORS[name]
        if name == "proxy":
            own = self._proxy_identity
        identity = Identity(own.uid if uid is None else uid, own.gid if gid is None else gid)
        return Actor(self.pod if side == "pod" else self.remote, identity)

    def listen(
        self, actor: Actor, who: str, ports: tuple[int, ...], families: tuple[Family, ...] | None = None
    ) -> None:
        """Have `who` answer on more ports of every address of the actor's namespace, TCP and UDP. Raises OSError."""

        async def respond(connection: socket.socket, _hops: int) -> Answer:
            _, port = endpoint(connection.getsockname())
            return Answer(who, port, endpoint(connection.getpeername()))

        for family in self.families if families is None else families:
            for port in ports:
                self._services.listen(actor.bound(family, port), respond)
                datagrams = actor.bound(family, port, socket.SOCK_DGRAM)
                self._services.listen_datagrams(datagrams, lambda _, peer, port: Answer(who, port, peer).encode())

    def _populate(self, family: Family) -> None:
        app, proxy, agent, remote = map(self.actor, ("app", "proxy", "agent", "remote"))
        for actor, who, ports in (
            (app, "app", (flows.APP_PORT,)),
            (proxy, "metrics", (flows.METRICS_PORT,)),
            (agent, "health", (flows.HEALTH_PORT,)),
            (agent, "agent", (flows.AGENT_PORT,)),
            (remote, "remote", REMOTE_PORTS),
            (remote, "control-plane", (flows.CONTROL_PLANE_PORT,)),
        ):
            self.listen(actor, who, ports, (family,))
        for actor, who, port in ((agent, "dns-proxy", DNS_PROXY_PORT), (remote, "dns-upstream", DNS_PORT)):
            self._services.listen_raw(actor.bound(family, port), dns.conversation(who))
            datagrams = actor.bound(family, port, socket.SOCK_DGRAM)
            self._services.listen_datagrams(datagrams, dns.datagram_responder(who))
        ours = ADDRESSES[family]
        mesh = Proxy(proxy, {(ours.virtual, flows.SERVICE_PORT): (ours.pod, flows.APP_PORT)})
        self._services.listen(proxy.bound(family, OUTBOUND), mesh.outbound)
        self._services.listen(proxy.bound(family, INBOUND, transparent=True), mesh.inbound)

    # --- probes ----------------------------------------------------------------------------------------------
    # The suppressions: every wait has a bound, and the caller may choose it.

    async def send(self, probe: flows.Send, *, timeout: float = 1.0) -> Answer:  # noqa: ASYNC109  # see above
        """Send what `traffic_types` describes."""
        way = self.tcp if probe.protocol == "tcp" else self.udp
        return await way(probe.source, probe.to, uid=probe.uid, gid=probe.gid, timeout=timeout)

    async def tcp(
        self,
        source: str,
        to: Endpoint,
        *,
        uid: int | None = None,
        gid: int | None = None,
        bind: Endpoint | None = None,
        timeout: float = 1.0,  # noqa: ASYNC109  # see above
    ) -> Answer:
        """Connect from an actor to a numeric address, from `bind` if given, and ask who is there; `timeout` in seconds.

        Never raises for what the network does: see `Answer.error`.
        """
        return await probes.ask_tcp(self.actor(source, uid=uid, gid=gid), to, bind, timeout)

    async def udp(
        self,
        source: str,
        to: Endpoint,
        *,
        uid: int | None = None,
        gid: int | None = None,
        bind: Endpoint | None = None,
        timeout: float = 1.0,  # noqa: ASYNC109  # see above
    ) -> Answer:
        """The same by one datagram, which is not sent again."""
        return await probes.ask_udp(self.actor(source, uid=uid, gid=gid), to, bind, timeout)

    async def dns(
        self,
        source: str,
        to: Endpoint,
        *,
        uid: int | None = None,
        gid: int | None = None,
        over: Literal["udp", "tcp"] = "udp",
        timeout: float = 1.0,  # noqa: ASYNC109  # see above
    ) -> Answer:
        """Ask a DNS server; `who` answered is told by the A record: "dns-proxy" or "dns-upstream"."""
        return await probes.ask_dns(self.actor(source, uid=uid, gid=gid), to, timeout, over_tcp=over == "tcp")

    # --- the end ---------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        try:
            if hasattr(self, "_services"):
                await self._services.close()
        finally:
            self._stack.close()

    def _catch_signals(self) -> None:
        task = asyncio.current_task()
        if task is None or threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                loop.add_signal_handler(number, self._terminate, number, task.cancel)
                self._stack.callback(loop.remove_signal_handler, number)

    def _terminate(self, number: int, cancel: Callable[[], bool]) -> None:
        self._terminated_by = number
        cancel()
