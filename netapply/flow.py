"""A flow: the first packet of a connection, and what is to become of it."""

from __future__ import annotations

from typing import Literal, TypeAlias

from netapply.ruleset import CtState, Family
from netapply.values import NamedTuple

TCP, UDP = 6, 17

Direction: TypeAlias = Literal["outbound", "inbound"]
#: picked-up: TCP without a SYN, of a connection that is older than connection tracking here. Conntrack calls it new.
FlowState: TypeAlias = Literal[CtState, "picked-up"]
Verdict: TypeAlias = Literal["bypass", "redirect", "tproxy", "dnat", "drop"]


class Flow(NamedTuple):
    """The first packet as the namespace's hooks see it, or in another `state` than new, one that is not the first.

    `direction`: "outbound" was sent by a socket in the namespace (hook output), "inbound" came from a device
    (hook prerouting). Addresses are packed, 4 or 16 bytes, network order. `iface` is the device that it leaves
    or enters by. `uid`, `gid`: of the sending socket, -1 where there is none. `cgroup`: its v2 path, no leading slash.
    """

    direction: Direction
    protocol: int
    source: bytes
    destination: bytes
    sport: int = 0
    dport: int = 0
    iface: str = "eth0"
    uid: int = -1
    gid: int = -1
    cgroup: str = ""
    state: FlowState = "new"
    mark: int = 0

    @property
    def family(self) -> Family:
        return "ip" if len(self.destination) == 4 else "ip6"

    @property
    def tracked_as(self) -> CtState:
        """The state that conntrack gives it (net.netfilter.nf_conntrack_tcp_loose is 1, as by default)."""
        return "new" if self.state == "picked-up" else self.state

    @property
    def opens(self) -> bool:
        """Whether it is a SYN: TCP that begins, whatever conntrack makes of it."""
        return self.protocol == TCP and self.state in ("new", "related", "untracked")


class Decision(NamedTuple):
    """What becomes of a flow.

    `port` is the local port that answers for redirect, tproxy and dnat, else 0. `address` is the packed address of a
    dnat. `zone` is the conntrack zone of the packet's own direction. `path` is the plan path that decided; it does
    not take part in comparison (`same_as`).
    """

    verdict: Verdict
    port: int = 0
    address: bytes = b""
    zone: int = 0
    path: str = ""

    def same_as(self, other: Decision) -> bool:
        """Same fate, whatever the reason."""
        return self[:4] == other[:4]
