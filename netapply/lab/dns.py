"""As much of DNS (RFC 1035) as the lab needs: one question for an A record, one answer that tells who gave it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

from netapply.lab.services import DatagramResponder, read_exactly

#: Who answers, by the A record that he answers everything with (documentation addresses, RFC 5737).
RECORDS: dict[str, str] = {"dns-proxy": "192.0.2.153", "dns-upstream": "192.0.2.53"}
NAME = "lab.netapply.example"

_HEADER = struct.Struct("!6H")  # id, flags, and the numbers of questions, answers, authorities, additionals
_LENGTH = struct.Struct("!H")  # before each message over TCP
_A_IN = struct.pack("!HH", 1, 1)  # type A, class IN
_RECORD = struct.Struct("!HHHIH4s")  # a pointer to the question's name, type, class, TTL, length, address
_RECURSE, _RESPONSE = 0x0100, 0x8180


def query(identifier: int) -> bytes:
    """A question for the A record of the lab's name."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in NAME.split("."))
    return _HEADER.pack(identifier, _RECURSE, 1, 0, 0, 0) + labels + b"\0" + _A_IN


def reply(message: bytes, who: str) -> bytes:
    """The answer of `who` to a message with one question: that question, and his A record."""
    identifier = _HEADER.unpack_from(message)[0]
    record = _RECORD.pack(0xC000 | _HEADER.size, 1, 1, 0, 4, socket.inet_aton(RECORDS[who]))
    return _HEADER.pack(identifier, _RESPONSE, 1, 1, 0, 0) + message[_HEADER.size :] + record


def answered_by(message: bytes, identifier: int) -> str:
    """Who gave this answer to the question `identifier`; "" when nobody of the lab did."""
    if len(message) < _HEADER.size + _RECORD.size or _HEADER.unpack_from(message)[0] != identifier:
        return ""
    address = socket.inet_ntoa(message[-4:])
    return next((who for who, record in RECORDS.items() if record == address), "")


def framed(message: bytes) -> bytes:
    """As sent over TCP."""
    return _LENGTH.pack(len(message)) + message


async def read_framed(connection: socket.socket) -> bytes:
    """One message over TCP; b"" when the stream ends before. Raises OSError."""
    length = await read_exactly(connection, _LENGTH.size)
    return await read_exactly(connection, *_LENGTH.unpack(length)) if length else b""


def datagram_responder(who: str) -> DatagramResponder:
    """Answers questions over UDP. What is no question gets an empty answer."""
    return lambda message, _peer, _port: reply(message, who) if len(message) > _HEADER.size else b""


def conversation(who: str) -> Callable[[socket.socket], Coroutine[Any, Any, None]]:
    """Answers questions over TCP until the client has no more."""

    async def converse(connection: socket.socket) -> None:
        while len(message := await read_framed(connection)) > _HEADER.size:
            await asyncio.get_running_loop().sock_sendall(connection, framed(reply(message, who)))

    return converse
