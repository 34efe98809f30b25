"""The command's end of the agent's socket: HTTP/1.0, as it ends where the connection does, and needs no library.

A one-shot command may import this, so it is written on the C part of `socket` alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from sys import byteorder
from typing import Any

from netapply.errors import NetapplyError
from netapply.fields import is_mapping
from netapply.jsonform import error_of
from netapply.sockets import socket

#: As in netapply.agent.AgentConfig, which takes asyncio to import.
CONTROL = "/run/netapply-agent/control.sock"
READ = "/run/netapply-agent/read.sock"
#: Says where the agent's socket is; "" is as if there were none.
VARIABLE = "NETAPPLY_AGENT"

_SCM_RIGHTS = 1  # linux/socket.h
_PIECE = 1 << 16
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~:")


class Client:
    """Asks the agent behind one socket; a connection for each question. `timeout` is in seconds, for each answer."""

    def __init__(self, path: str, timeout: float = 130.0) -> None:
        self.path = path
        self._timeout = timeout

    def ask(self, method: str, target: str, body: bytes = b"", *, fd: int = -1) -> dict[str, Any]:
        """What the agent answers, `fd` being sent along. Raises NetapplyError, also the one that the agent raised."""
        return _document(b"".join(self._answer(method, target, body, fd, self._timeout)), self.path)

    def lines(self, target: str) -> Iterator[dict[str, Any]]:
        """The JSON Lines that the agent sends, until it ends. Raises NetapplyError where it refuses."""
        rest = b""
        for piece in self._answer("GET", target, b"", -1, None):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield _checked(json.loads(line))
        if rest.strip():
            yield _checked(json.loads(rest))

    def _answer(self, method: str, target: str, body: bytes, fd: int, patience: float | None) -> Iterator[bytes]:
        """The body of the answer, piece by piece."""
        try:
            sock = connect(self.path, self._timeout)
        except OSError as error:
            raise unreachable(self.path, error) from error
        try:
            length = f"content-length: {len(body)}\r\n" if body or method == "PUT" else ""
            _send(sock, f"{method} {target} HTTP/1.0\r\n{length}\r\n".encode() + body, fd)
            head, rest = _head(sock)
            if not head.startswith(b"HTTP/1."):
                raise NetapplyError(f"what answers at {self.path} is no agent")
            sock.settimeout(patience)
            yield rest
            while piece := sock.recv(_PIECE):
                yield piece
        except TimeoutError as error:
            raise NetapplyError(f"the agent at {self.path} did not answer in {self._timeout:g} s") from error
        except OSError as error:
            raise NetapplyError(f"the agent at {self.path} broke off: {error.strerror}") from error
        finally:
            sock.close()


def connect(path: str, timeout: float) -> socket.socket:
    """A connection to the agent. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def unreachable(path: str, error: OSError) -> NetapplyError:
    """The error for a socket that cannot be connected to."""
    if error.errno == 13:  # EACCES
        step = "run as root, or for reading as a member of the agent's reading group"
        return NetapplyError(f"you may not connect to the agent at {path}", next_step=step)
    return NetapplyError(f"no agent answers at {path}: {error.strerror}", next_step="start it: netapply agent")


def reader() -> Client:
    """The agent, to look at: by its control socket, or by the one for reading where that one is closed to us."""
    named = os.environ.get(VARIABLE)
    if named:
        return Client(named)
    path = CONTROL if os.access(CONTROL, os.W_OK) or not os.access(READ, os.W_OK) else READ
    return Client(path)


def quoted(text: str) -> str:
    """A name as one word of a path, or of a query (RFC 3986, percent-encoding)."""
    return "".join(chr(each) if chr(each) in _PLAIN else f"%{each:02X}" for each in os.fsencode(text))


def _send(sock: socket.socket, data: bytes, fd: int) -> None:
    view = memoryview(data)
    try:
        if fd >= 0:
            rights = [(socket.SOL_SOCKET, _SCM_RIGHTS, fd.to_bytes(4, byteorder))]
            view = view[sock.sendmsg([view], rights) :]
        sock.sendall(view)
    except BrokenPipeError:
        return  # refused before all was read: the answer says why


def _head(sock: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(_PIECE)
        if not piece or len(data) > _PIECE:
            raise OSError(104, "the answer has no head")
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def _document(data: bytes, path: str) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except ValueError as error:
        raise NetapplyError(f"what answers at {path} is no agent, or it broke off") from error
    return _checked(answer)


def _checked(answer: Any) -> dict[str, Any]:
    if not is_mapping(answer):
        raise NetapplyError("what answers is no agent")
    if answer.get("ok") is False:
        raise error_of(answer["error"])
    return answer
