"""Services that say who they are, on an asyncio loop, over TCP and UDP.

The question is one line, the number of proxies that it has come through; the answer is one line of JSON.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

from netapply.lab.actors import IPV6_FREEBIND, MTU, OwnedSocket
from netapply.lab.answers import Answer, Endpoint

CONVERSATION = 3.0  # seconds that a service gives one connection
#: Answers one connection whose question has been read: (connection, number of proxies that it came through).
Responder: TypeAlias = Callable[[socket.socket, int], Awaitable[Answer]]
#: Answers one datagram: (request, peer, local port) -> reply.
DatagramResponder: TypeAlias = Callable[[bytes, Endpoint, int], bytes]
#: Talks on one connection until it is done with it.
Conversation: TypeAlias = Callable[[socket.socket], Coroutine[Any, Any, None]]

IP_PKTINFO = 8  # linux/in.h; the socket module has it from Python 3.12
_IN_PKTINFO = struct.Struct("=i4s4s")  # struct in_pktinfo: ifindex, spec_dst, addr
_IN6_PKTINFO = struct.Struct("=16si")  # struct in6_pktinfo: addr, ifindex


class Services:
    """The listeners of a lab and the conversations that go on. `close` ends them all within a second."""

    def __init__(self) -> None:
        self._listeners: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self, listener: OwnedSocket, respond: Responder) -> None:
        """Answer every connection to a listening TCP socket, one line for one line."""

        async def converse(connection: socket.socket) -> None:
            question = await read_line(connection)
            if question.strip().isdigit():
                answer = await respond(connection, int(question))
                await asyncio.get_running_loop().sock_sendall(connection, answer.encode())

        self.listen_raw(listener, converse)

    def listen_raw(self, listener: OwnedSocket, converse: Conversation) -> None:
        """Hand every connection to a listening TCP socket to `converse`."""
        self._listeners.append(listener)
        self._start(self._accept(listener, converse))

    def listen_datagrams(self, sock: OwnedSocket, respond: DatagramResponder) -> None:
        """Answer every datagram from the very address that it was sent to, as conntrack wants to see it.

        (With a wildcard socket the kernel would choose a source of its own, and a redirected client's reply would
        not be recognised.)
        """
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)  # or EINVAL for an address that no device has
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        self._listeners.append(sock)
        asyncio.get_running_loop().add_reader(sock, _answer_datagrams, sock, sock.getsockname()[1], respond)

    async def close(self) -> None:
        """Close every listener and end every conversation; at most a second is waited for them."""
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
        for task in self._tasks:
            task.cancel()
        try:
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=1.0)
        finally:
            for listener in self._listeners:
                listener.close()
            self._listeners.clear()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket, converse: Conversation) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except ConnectionError:  # accept(2): ECONNABORTED, the client went away in the queue
                continue
            self._start(_bounded(connection, converse))


async def ask(connection: socket.socket, hops: int = 0) -> bytes:
    """Ask who is there, having come through `hops` proxies; b"" when the other side closed instead. Raises OSError."""
    await asyncio.get_running_loop().sock_sendall(connection, b"%d\n" % hops)
    return await read_line(connection)


async def read_line(connection: socket.socket) -> bytes:
    """One line, at most 64 KiB; b"" when the stream ends before. Raises OSError."""
    data = b""
    while not data.endswith(b"\n") and len(data) < MTU:
        chunk = await asyncio.get_running_loop().sock_recv(connection, MTU)
        if not chunk:
            return b""
        data += chunk
    return data


async def read_exactly(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, or b"" when the stream ends before. Raises OSError."""
    data = b""
    while len(data) < size:
        chunk = await asyncio.get_running_loop().sock_recv(connection, size - len(data))
        if not chunk:
            return b""
        data += chunk
    return data


def endpoint(name: tuple[Any, ...]) -> Endpoint:
    """A socket name of either family as (address, port)."""
    return str(name[0]), int(name[1])


async def _bounded(connection: socket.socket, converse: Conversation) -> None:
    with connection:
        try:
            async with asyncio.timeout(CONVERSATION):
                await converse(connection)
        except OSError:  # the client went away or said nothing in time; it has seen so itself
            pass


def _answer_datagrams(sock: socket.socket, port: int, respond: DatagramResponder) -> None:
    """Read one datagram and answer it. The loop calls again while there are more."""
    try:
        request, ancillary, _, peer = sock.recvmsg(MTU, 64)
        sock.sendmsg([respond(request, endpoint(peer), port)], [_reply_source(*item) for item in ancillary], 0, peer)
    except OSError:  # a pending ICMP error of an earlier reply, or a client that cannot be reached
        pass


def _reply_source(level: int, kind: int, data: bytes) -> tuple[int, int, bytes]:
    if level == socket.IPPROTO_IPV6:
        address, _ = _IN6_PKTINFO.unpack(data)
        return level, kind, _IN6_PKTINFO.pack(address, 0)
    _, _, destination = _IN_PKTINFO.unpack(data)
    return level, kind, _IN_PKTINFO.pack(0, destination, b"\0\0\0\0")
