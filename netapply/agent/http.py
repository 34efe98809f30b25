"""HTTP/1.1 over sockets that may carry descriptors: connections, caps and deadlines. It knows nothing of netapply.

h11 does the protocol. The sockets are read by recvmsg(2), as a client names a namespace by a descriptor that comes with
the bytes of its request (SCM_RIGHTS), which asyncio's streams would drop. Nobody is believed: the head, the body, the
answer's way out and the whole request have deadlines, and who may not ask is refused before his body is read.
"""

from __future__ import annotations

import array
import asyncio
import http
import os
import select
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Protocol

import h11

from netapply.agent.policy import Meter, Peer, peer_of
from netapply.values import NamedTuple

_PIECE = 1 << 16
_MOST_DESCRIPTORS = 4
_ROOM = socket.CMSG_SPACE(_MOST_DESCRIPTORS * 4)
#: Of linux/socket.h: descriptors that come must not leak into anything that the embedding program starts.
_CLOEXEC = socket.MSG_CMSG_CLOEXEC


class Deadlines(NamedTuple):
    """Seconds: for the first byte of a request, its head, its body, the work, each piece of the answer, and the end."""

    idle: float = 30.0
    head: float = 5.0
    body: float = 15.0
    work: float = 120.0
    write: float = 10.0
    linger: float = 1.0


class Request(NamedTuple):
    """What came. `descriptors` are closed when the answer is made."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    descriptors: tuple[int, ...]
    peer: Peer


class Response(NamedTuple):
    """An answer. `stream`, where there is one, follows the body piece by piece until it ends or the client leaves."""

    status: int
    body: bytes = b""
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    stream: AsyncGenerator[bytes, None] | None = None


class Admitted(NamedTuple):
    """A request that may be made: how many bytes its body may have, whether with descriptors, and what does it."""

    largest_body: int
    descriptors: bool
    work: Callable[[Request], Awaitable[Response]]


class Application(Protocol):
    """What answers."""

    def admit(self, peer: Peer, method: str, target: str) -> Admitted | Response:
        """Decide by the head alone; a Response refuses, and ends the connection if there is a body."""
        ...

    def fault(self, status: int, message: str) -> Response:
        """An answer about what is wrong with the request as HTTP."""
        ...


class _Gone(Exception):  # noqa: N818 - an event
    """The client has left, or is too slow."""


class Server:
    """Accepts on one listening socket, which is its to close."""

    def __init__(
        self, listener: socket.socket, application: Application, meter: Meter, deadlines: Deadlines | None = None
    ) -> None:
        listener.setblocking(False)
        self.listener = listener
        self._application = application
        self._meter = meter
        self._deadlines = deadlines or Deadlines()
        self._clients: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to accept."""
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def close(self) -> None:
        """Accept nobody more, and end all connections. Idempotent."""
        tasks = [*self._clients, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self.listener)
            except OSError:  # too many open files: others will be closed
                await asyncio.sleep(0.05)
                continue
            try:
                sock.setblocking(False)
                peer = peer_of(sock)
            except OSError:
                sock.close()
                continue
            if not self._meter.enter(peer.uid):
                with suppress(OSError):  # the socket's buffer takes it, or it is lost
                    sock.send(b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n")
                sock.close()
                continue
            task = loop.create_task(self._serve(sock, peer))
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)

    async def _serve(self, sock: socket.socket, peer: Peer) -> None:
        connection = _Connection(sock, peer, self._application, self._deadlines)
        try:
            await connection.run()
        except (_Gone, OSError, TimeoutError):
            pass
        finally:
            connection.close()
            self._meter.leave(peer.uid)


class _Connection:
    """One client, request after request."""

    def __init__(self, sock: socket.socket, peer: Peer, application: Application, deadlines: Deadlines) -> None:
        self._sock = sock
        self._peer = peer
        self._application = application
        self._deadlines = deadlines
        self._loop = asyncio.get_running_loop()
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=16 * 1024)
        self._descriptors: list[int] = []

    def close(self) -> None:
        self._drop_descriptors()
        self._sock.close()

    async def run(self) -> None:
        while True:
            try:
                await self._exchange()
            except h11.RemoteProtocolError as error:
                await self._refuse(self._application.fault(error.error_status_hint, str(error)))
            self._drop_descriptors()
            if self._http.our_state is h11.MUST_CLOSE:
                await self._linger()
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _refuse(self, response: Response) -> None:
        """Answer, and end the connection: what may still come is not wanted."""
        await self._answer(response._replace(headers=(*response.headers, ("connection", "close"))))

    async def _linger(self) -> None:
        """Read away what more is sent for a moment: with that in its queue a closed socket takes our answer along."""
        with suppress(OSError, TimeoutError):
            self._sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(self._deadlines.linger):
                while await self._loop.sock_recv(self._sock, _PIECE):
                    pass

    async def _exchange(self) -> None:
        """One request and its answer."""
        head = await self._head()
        if head is None:
            return
        method, target = head.method.decode("ascii"), head.target.decode("ascii")
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
        announced = int(headers.get("content-length", "0"))  # h11 has seen that it is a number
        admitted = self._application.admit(self._peer, method, target)
        if isinstance(admitted, Response):
            if announced or "transfer-encoding" in headers:
                await self._refuse(admitted)
            elif await self._body(0) is not None:
                await self._answer(admitted)
            return
        body = None if announced > admitted.largest_body else await self._body(admitted.largest_body)
        if body is None:
            await self._refuse(self._application.fault(413, f"the body has more than {admitted.largest_body} bytes"))
        elif self._descriptors and not admitted.descriptors:
            await self._answer(self._application.fault(400, "no descriptor is taken here"))
        else:
            request = Request(method, target, headers, body, tuple(self._descriptors), self._peer)
            await self._answer(await self._work(admitted, request))

    # --- in --------------------------------------------------------------------------------------------------

    async def _head(self) -> h11.Request | None:
        """The next request's head; None when the client has said goodbye."""
        async with asyncio.timeout(self._deadlines.idle):
            while not self._http.trailing_data[0]:
                if not await self._receive():
                    return None
        async with asyncio.timeout(self._deadlines.head):
            event = await self._next()
        return event if isinstance(event, h11.Request) else None

    async def _body(self, largest: int) -> bytes | None:
        """The whole body; None where it is larger than may be."""
        pieces: list[bytes] = []
        size = 0
        async with asyncio.timeout(self._deadlines.body):
            while True:
                event = await self._next()
                if isinstance(event, h11.EndOfMessage):
                    return b"".join(pieces)
                if isinstance(event, h11.Data):
                    size += len(event.data)
                    if size > largest:
                        return None
                    pieces.append(bytes(event.data))
                elif isinstance(event, h11.ConnectionClosed):
                    raise _Gone

    async def _next(self) -> object:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._http.they_are_waiting_for_100_continue:
                await self._send(h11.InformationalResponse(status_code=100, headers=[]))
            await self._receive()

    async def _receive(self) -> bool:
        """Take what has come; False at the end of it."""
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(_PIECE, _ROOM, _CLOEXEC)
                break
            except BlockingIOError:
                await _readable(self._loop, self._sock)
        for level, kind, body in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors.extend(array.array("i", body[: len(body) // 4 * 4]))
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > _MOST_DESCRIPTORS:
            raise h11.RemoteProtocolError(f"more than {_MOST_DESCRIPTORS} descriptors came", error_status_hint=400)
        self._http.receive_data(data)
        return bool(data)

    def _drop_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    # --- work ------------------------------------------------------------------------------------------------

    async def _work(self, admitted: Admitted, request: Request) -> Response:
        """What is asked for. A client who leaves cancels it, as Ctrl-C does with the command."""
        task = asyncio.ensure_future(admitted.work(request))
        watch = asyncio.ensure_future(self._hung_up())
        try:
            await asyncio.wait([task, watch], timeout=self._deadlines.work, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            task.cancel()
            await asyncio.wait([task])
            if watch.done():
                raise _Gone
            return self._application.fault(504, f"not done after {self._deadlines.work:g} s; it was given up")
        finally:
            for each in (task, watch):
                each.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    async def _hung_up(self) -> None:
        """Back when both directions are closed. A client that only ends its own half waits for the answer still."""
        poll = select.poll()
        poll.register(self._sock, 0)  # POLLHUP is told unasked
        await _readable(self._loop, self._sock)  # more bytes, the end of one direction, or of both
        while not poll.poll(0):  # noqa: ASYNC110 - epoll(7) would tell the bytes that are not read yet again and again
            await asyncio.sleep(0.5)

    # --- out -------------------------------------------------------------------------------------------------

    async def _answer(self, response: Response) -> None:
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            raise _Gone
        headers = [("content-type", response.kind), ("cache-control", "no-store"), *response.headers]
        if response.stream is None:
            headers.append(("content-length", str(len(response.body))))
        head = (
            self._http.send(h11.Response(status_code=response.status, headers=headers, reason=_phrase(response.status)))
            or b""
        )
        if response.stream is None:
            rest = self._http.send(h11.Data(data=response.body)) or b""
            await self._write(head + rest + (self._http.send(h11.EndOfMessage()) or b""))
            return
        async with aclosing(response.stream) as pieces:
            await self._write(head)
            await self._pour(pieces)
        await self._send(h11.EndOfMessage())

    async def _pour(self, pieces: AsyncGenerator[bytes, None]) -> None:
        watch = asyncio.ensure_future(self._hung_up())
        try:
            while True:
                piece = asyncio.ensure_future(anext(pieces, None))
                await asyncio.wait([piece, watch], return_when=asyncio.FIRST_COMPLETED)
                if not piece.done():
                    piece.cancel()
                    await asyncio.gather(piece, return_exceptions=True)
                    raise _Gone
                data = piece.result()
                if data is None:
                    return
                await self._send(h11.Data(data=data))
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _send(self, event: h11.Event) -> None:
        await self._write(self._http.send(event) or b"")

    async def _write(self, data: bytes) -> None:
        if data:
            async with asyncio.timeout(self._deadlines.write):
                await self._loop.sock_sendall(self._sock, data)


def _phrase(status: int) -> bytes:
    return http.HTTPStatus(status).phrase.encode()


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_reader(sock.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock.fileno())
