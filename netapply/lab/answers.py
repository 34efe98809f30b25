"""What comes back from a probe: who answered, and by which proxies the connection got there.

On the wire an answer is one line of JSON, the same over TCP and UDP.
"""

from __future__ import annotations

import errno
import json
from typing import Any, TypeAlias

from netapply.values import NamedTuple

#: Address in text and port.
Endpoint: TypeAlias = tuple[str, int]

#: errno → the word in `Answer.error`.
_WORDS = {
    errno.ECONNREFUSED: "refused",
    errno.ETIMEDOUT: "timeout",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EADDRNOTAVAIL: "no such source address",
    errno.EPERM: "denied",
}


class Hop(NamedTuple):
    """A proxy listener on the way: its port, who it saw calling, and where the caller wanted to go."""

    port: int
    peer: Endpoint
    original: Endpoint


class Answer(NamedTuple):
    """`who` answered on its local `port`, and saw `peer` calling; `via` are the proxies, the first one first.

    `error` is "" or says why nobody answered: refused, timeout, reset, unreachable, denied, loop (a proxy was asked to
    connect to itself), garbled (an answer that is none), or the kernel's name of another errno. `who` is "" then, and
    `via` still tells how far the connection got where a proxy could say so.
    """

    who: str = ""
    port: int = 0
    peer: Endpoint | None = None
    via: tuple[Hop, ...] = ()
    error: str = ""

    @property
    def via_ports(self) -> tuple[int, ...]:
        """The local ports of the proxies, the first one first."""
        return tuple(hop.port for hop in self.via)

    @property
    def original_dst(self) -> Endpoint | None:
        """Where the client wanted to go, as the first proxy learned it from the kernel; None without a proxy."""
        return self.via[0].original if self.via else None

    def encode(self) -> bytes:
        """One line of JSON."""
        return json.dumps(self._asdict()).encode() + b"\n"


def decode(line: bytes) -> Answer:
    """The inverse of `encode`. What is not an answer gives one with the error "reset" (nothing came) or "garbled"."""
    if not line:
        return Answer(error="reset")
    try:
        found: dict[str, Any] = json.loads(line)
        hops = tuple(Hop(port, tuple(peer), tuple(original)) for port, peer, original in found["via"])
        peer = found["peer"]
        return Answer(found["who"], found["port"], tuple(peer) if peer else None, hops, found["error"])
    except (ValueError, KeyError, TypeError):
        return Answer(error="garbled")


def failure(error: OSError) -> str:
    """The word for `Answer.error`. asyncio's and the socket's TimeoutError carry no errno."""
    if isinstance(error, TimeoutError):
        return "timeout"
    number = error.errno or 0
    return _WORDS.get(number) or errno.errorcode.get(number, "unknown")
