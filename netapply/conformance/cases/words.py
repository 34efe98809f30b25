"""The vocabulary of the tables: who, where to, and what must become of it. Each sentence is about both families.

out(OUT, "elsewhere", 443)            an application calls a remote address, and the outbound port answers
into(IN, 8080)                        a remote client calls the pod, and the inbound port answers
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any, Literal

from netapply.conformance.case import APP, DIRECT, DROPPED, PROXY, REFUSED, ROOT, Probe, Sender, Verdict, captured
from netapply.conformance.world import AF, BY_DEVICE, LOOPBACK, POD, REMOTE
from netapply.ruleset import FAMILIES, Family

#: What the default plan leads to.
OUT, IN = captured(15001, "redirect"), captured(15006, "redirect")
TPROXIED, DNS = captured(15006, "tproxy"), captured(15053, "redirect")
#: A proxy as Istio runs it where inbound is TPROXY.
BY_GROUP = Sender(0, 1337)

_ADDRESSES: dict[str, dict[Family, str]] = {
    "pod": POD,
    "remote": REMOTE,
    "loopback": LOOPBACK,
    "passthrough": {"ip": "127.0.0.6", "ip6": "::6"},
    "elsewhere": {"ip": "198.51.100.7", "ip6": "2001:db8:7::7"},
    "nearby": {"ip": "198.51.101.7", "ip6": "2001:db8:8::7"},
    "virtual": {"ip": "203.0.113.10", "ip6": "2001:db8:10::10"},
    **{f"pod {name}": {family: wire.pod(family) for family in FAMILIES} for name, wire in BY_DEVICE.items()},
    **{f"remote {name}": {family: wire.remote(family) for family in FAMILIES} for name, wire in BY_DEVICE.items()},
}
_FULL = {"ip": 32, "ip6": 128}
#: Prefix lengths by which "elsewhere" and "nearby" are told apart.
_NET = {"ip": 24, "ip6": 48}


def address(name: str, family: Family) -> str:
    """The address of a name, or of a text in the form in which sockets tell it; "" is none."""
    if name in _ADDRESSES or not name:
        return _ADDRESSES[name][family] if name else ""
    return shown(ends(name, _FULL["ip6" if ":" in name else "ip"])[0], name)


def hosts(*names: str) -> list[str]:
    """The addresses of both families, as a plan lists them."""
    return [address(name, family) for name in names for family in FAMILIES]


def nets(*names: str) -> list[str]:
    """The networks around them, /24 and /48."""
    return [block(address(name, family), _NET[family]) for name in names for family in FAMILIES]


def block(text: str, prefix: int) -> str:
    """The block of this length that holds the address."""
    first, _ = ends(text, prefix)
    return f"{shown(first, text)}/{prefix}"


def ends(text: str, prefix: int) -> tuple[int, int]:
    """The first and the last address of that block."""
    family: Family = "ip6" if ":" in text else "ip"
    size = 1 << (_FULL[family] - prefix)
    first = int.from_bytes(socket.inet_pton(AF[family], text)) // size * size
    return first, first + size - 1


def shown(number: int, like: str) -> str:
    """The address of this number, of the family of `like`."""
    family: Family = "ip6" if ":" in like else "ip"
    return socket.inet_ntop(AF[family], number.to_bytes(_FULL[family] // 8))


def out(
    expect: Verdict,
    to: str = "remote",
    port: int = 80,
    protocol: Literal["tcp", "udp"] = "tcp",
    *,
    sender: Sender = APP,
    source: str = "",
    only: Iterable[Family] = FAMILIES,
    **more: Any,
) -> tuple[Probe, ...]:
    """Somebody in the pod sends; `more` are fields of Probe."""
    return tuple(
        Probe(
            "pod",
            protocol,
            address(to, family),
            port,
            expect,
            sender,
            address(source, family),
            **more,
        )
        for family in _families(to, only)
    )


def into(
    expect: Verdict,
    port: int = 8080,
    protocol: Literal["tcp", "udp"] = "tcp",
    *,
    to: str = "pod",
    source: str = "",
    only: Iterable[Family] = FAMILIES,
    **more: Any,
) -> tuple[Probe, ...]:
    """Somebody elsewhere sends to the pod, or through it; `more` are fields of Probe."""
    return tuple(
        Probe("remote", protocol, address(to, family), port, expect, ROOT, address(source, family), **more)
        for family in _families(to, only)
    )


def _families(to: str, only: Iterable[Family]) -> Iterable[Family]:
    """Those that are asked for, or that of a numeric address."""
    if to in _ADDRESSES:
        return only
    return ("ip6",) if ":" in to else ("ip",)


__all__ = [
    "APP", "BY_GROUP", "DIRECT", "DNS", "DROPPED", "IN", "OUT", "PROXY", "REFUSED", "ROOT", "TPROXIED", "Sender",
    "address", "block", "captured", "ends", "hosts", "into", "nets", "out", "shown",
]  # fmt: skip
