"""Probes: one connection or datagram each, and what came back. They never raise for what the network does."""

from __future__ import annotations

import asyncio
import secrets
import socket

from netapply.lab import dns
from netapply.lab.actors import MTU, Actor, bind_anywhere, family_of
from netapply.lab.answers import Answer, Endpoint, decode, failure
from netapply.lab.services import ask


async def ask_tcp(actor: Actor, to: Endpoint, bind: Endpoint | None, patience: float) -> Answer:
    """Connect, from `bind` if given, and ask who is there, all within `patience` seconds."""
    try:
        async with asyncio.timeout(patience):
            with await actor.connect(to, source=bind) as sock:
                return decode(await ask(sock))
    except OSError as error:
        return Answer(error=failure(error))


async def ask_udp(actor: Actor, to: Endpoint, bind: Endpoint | None, patience: float) -> Answer:
    """The same by one datagram, which is not sent again."""
    try:
        return decode(await _exchange(actor, to, b"0\n", bind, patience))
    except OSError as error:
        return Answer(error=failure(error))


async def ask_dns(actor: Actor, server: Endpoint, patience: float, *, over_tcp: bool) -> Answer:
    """Ask a DNS server; who answered is told by the A record, and nothing else is."""
    identifier = secrets.randbelow(0x10000)
    question = dns.query(identifier)
    try:
        if over_tcp:
            async with asyncio.timeout(patience):
                with await actor.connect(server) as sock:
                    await asyncio.get_running_loop().sock_sendall(sock, dns.framed(question))
                    message = await dns.read_framed(sock)
        else:
            message = await _exchange(actor, server, question, None, patience)
    except OSError as error:
        return Answer(error=failure(error))
    who = dns.answered_by(message, identifier)
    return Answer(who, error="" if who else "garbled" if message else "reset")


async def _exchange(actor: Actor, to: Endpoint, request: bytes, bind: Endpoint | None, patience: float) -> bytes:
    with actor.open(family_of(to[0]), socket.SOCK_DGRAM) as sock:
        if bind:
            bind_anywhere(sock, bind)
        sock.connect(to)  # so that a refusal (ICMP) is reported, and nobody else's datagram is taken
        sock.send(request)
        async with asyncio.timeout(patience):
            return await asyncio.get_running_loop().sock_recv(sock, MTU)
