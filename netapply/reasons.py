"""Why a match did not hold, in a phrase about the packet: "the port is 443". Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from netapply.flow import TCP, UDP, Flow
from netapply.ruleset import Match, NamedSet, Side
from netapply.sockets import socket

PROTOCOLS = {1: "icmp", TCP: "tcp", UDP: "udp", 58: "ipv6-icmp"}


def why_not(match: Match, flow: Flow, connmark: int, sets: Mapping[str, NamedSet]) -> str:
    """What of `flow` is at odds with `match`. `flow.mark` and `connmark` are those of the moment."""
    match match.kind:
        case "iface":
            return _device(flow, match.direction)
        case "address":
            return f"the {_end(match.side)} is {show_address(_address(flow, match.side))}"
        case "set":
            among = "among" if match.negate else "not among"
            return f"{show_address(_address(flow, match.side))} is {among} its {len(sets[match.set].elements)} blocks"
        case "protocol":
            return f"the protocol is {PROTOCOLS.get(flow.protocol, flow.protocol)}"
        case "port":
            return f"the port is {flow.dport}" if match.side == "dst" else f"the source port is {flow.sport}"
        case "syn":
            return "it opens no connection"
        case "owner":
            if flow.direction == "inbound":
                return "a packet that comes in has no owner"
            return f"the {match.id} is {flow.uid if match.id == 'uid' else flow.gid}"
        case "cgroup":
            return f"the cgroup is {flow.cgroup}" if flow.cgroup else "the process is in no cgroup but the root"
        case "mark":
            return f"the mark is {flow.mark:#x}"
        case "connmark":
            return f"the connection's mark is {connmark:#x}"
        case "state":
            return f"the connection is {flow.tracked_as}"
        case "socket":
            return "no socket of the proxy holds this connection"
        case "limit":
            return "the limit is exceeded"
        case _:
            assert_never(match)


def _device(flow: Flow, direction: str) -> str:
    if (direction == "in") != (flow.direction == "inbound"):
        return "a packet that is sent here comes in by none" if direction == "in" else "the packet does not leave here"
    return f"it {'enters' if direction == 'in' else 'leaves'} by {flow.iface}"


def _end(side: Side) -> str:
    return "source" if side == "src" else "destination"


def _address(flow: Flow, side: Side) -> bytes:
    return flow.source if side == "src" else flow.destination


def show_address(packed: bytes) -> str:
    """The address in its family's spelling."""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def show_endpoint(packed: bytes, port: int) -> str:
    """Address and port: 10.0.0.5:443, [fd00::5]:443."""
    address = show_address(packed)
    return f"{address}:{port}" if len(packed) == 4 else f"[{address}]:{port}"
