"""The mesh proxy: takes captured connections, asks the kernel where they wanted to go, and goes there, as Envoy does.

Its answer is the answer of whoever it reached, with its own hop in front.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping

from netapply.lab.actors import Actor, family_of
from netapply.lab.answers import Answer, Endpoint, Hop, decode, failure
from netapply.lab.services import ask, endpoint
from netapply.values import NamedTuple

OUTBOUND, INBOUND = 15001, 15006
PATIENCE = 0.8  # seconds for the connection onward: less than a client's second, so that the proxy can still say why
MOST_HOPS = 8  # rules that lead the proxy back to itself would never end
MARK = 1337  # of the connections that carry a client's source address
PASSTHROUGH: dict[str, str] = {"ip": "127.0.0.6", "ip6": "::6"}  # Istio's inbound passthrough source

SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h, and IP6T_SO_ORIGINAL_DST of netfilter_ipv6/ip6_tables.h
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4x")


class Captured(NamedTuple):
    """A connection that reached one of the proxy's listeners. `local` is the socket's own address."""

    hop: Hop
    local: Endpoint
    hops_before: int

    @property
    def by_tproxy(self) -> bool:
        """TPROXY leaves the destination as it was, so that it is the local address of the socket; REDIRECT does not."""
        return self.hop.original == self.local

    @property
    def leads_back(self) -> bool:
        """Somebody called the listener itself, or the rules lead the proxy to itself again and again."""
        called_directly = self.by_tproxy and self.local[1] == self.hop.port
        return called_directly or self.hops_before >= MOST_HOPS


class Proxy:
    """`services` maps virtual endpoints to where their traffic goes: what a mesh's control plane tells its proxies."""

    def __init__(self, actor: Actor, services: Mapping[Endpoint, Endpoint]) -> None:
        self._actor = actor
        self._services = services

    async def outbound(self, connection: socket.socket, hops: int) -> Answer:
        """What the application wanted to reach, asked as the proxy's uid from no particular source."""
        captured = _captured(connection, OUTBOUND, hops)
        wanted = captured.hop.original
        return await self._onward(captured, self._services.get(wanted, wanted))

    async def inbound(self, connection: socket.socket, hops: int) -> Answer:
        """The application, asked from 127.0.0.6 or ::6; if TPROXY brought the connection, in its client's name."""
        captured = _captured(connection, INBOUND, hops)
        hop = captured.hop
        source = hop.peer[0] if captured.by_tproxy else PASSTHROUGH[family_of(hop.original[0])]
        return await self._onward(captured, hop.original, (source, 0), MARK if captured.by_tproxy else 0)

    async def _onward(self, captured: Captured, to: Endpoint, source: Endpoint | None = None, mark: int = 0) -> Answer:
        hop, hops = captured.hop, captured.hops_before + 1
        if captured.leads_back:
            return Answer(via=(hop,), error="loop")
        try:
            async with asyncio.timeout(PATIENCE):
                sock = await self._actor.connect(to, source=source, mark=mark, transparent=bool(mark))
                with sock:
                    answer = decode(await ask(sock, hops))
        except OSError as error:
            return Answer(via=(hop,), error=failure(error))
        return answer._replace(via=(hop, *answer.via))


def _captured(connection: socket.socket, port: int, hops: int) -> Captured:
    hop = Hop(port, endpoint(connection.getpeername()), original_destination(connection))
    return Captured(hop, endpoint(connection.getsockname()), hops)


def original_destination(connection: socket.socket) -> Endpoint:
    """Where the client wanted to go: from conntrack, or without an entry there the socket's own address (TPROXY)."""
    ipv6 = connection.family == socket.AF_INET6
    level, layout = (socket.IPPROTO_IPV6, _SOCKADDR_IN6) if ipv6 else (socket.IPPROTO_IP, _SOCKADDR_IN)
    try:
        port, packed = layout.unpack(connection.getsockopt(level, SO_ORIGINAL_DST, layout.size))
    except OSError:
        return endpoint(connection.getsockname())
    return socket.inet_ntop(connection.family, packed), port
