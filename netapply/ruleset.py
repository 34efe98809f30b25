"""The rule set: what a backend sees, and all that it sees.

Values are named tuples: immutable, hashable, compared by content, and cheap to import (a frozen dataclass
costs some 0.6 ms of start-up each; see docs/decisions/0002). The members of the two unions, `Match` and
`Statement`, carry a `kind` so that two of them are equal only when they are the same thing.

Words are nft(8)'s: table, chain, base chain, hook, priority, rule, match, statement, set, element, family.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

from netapply.sockets import socket
from netapply.values import NamedTuple

Family: TypeAlias = Literal["ip", "ip6"]
TableFamily: TypeAlias = Literal["ip", "ip6", "inet"]
Hook: TypeAlias = Literal["prerouting", "input", "forward", "output", "postrouting"]
ChainType: TypeAlias = Literal["nat", "filter", "route"]
Side: TypeAlias = Literal["src", "dst"]
CtState: TypeAlias = Literal["new", "established", "related", "invalid", "untracked"]

FAMILIES: tuple[Family, Family] = ("ip", "ip6")


class Cidr(NamedTuple):
    """An address block. `packed` is 4 or 16 bytes in network order, host bits zero; `prefix` is its length in bits."""

    packed: bytes
    prefix: int

    @property
    def family(self) -> Family:
        return "ip" if len(self.packed) == 4 else "ip6"

    def __str__(self) -> str:
        kind = socket.AF_INET if len(self.packed) == 4 else socket.AF_INET6
        return f"{socket.inet_ntop(kind, self.packed)}/{self.prefix}"


class PortRange(NamedTuple):
    """Ports `first` to `last`, both included, 0..65535. A single port has both alike."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


# --- matches -------------------------------------------------------------------------------------------------


class IfaceMatch(NamedTuple):
    """Packet comes in ("in") or leaves ("out") by this interface. A trailing `+` matches any name with that prefix."""

    direction: Literal["in", "out"]
    name: str
    negate: bool = False
    kind: Literal["iface"] = "iface"


class AddressMatch(NamedTuple):
    """Source or destination lies in one block."""

    side: Side
    cidr: Cidr
    negate: bool = False
    kind: Literal["address"] = "address"


class SetMatch(NamedTuple):
    """Source or destination address is an element of the named set (of the rule set's `sets`)."""

    side: Side
    set: str
    negate: bool = False
    kind: Literal["set"] = "set"


class ProtocolMatch(NamedTuple):
    """Layer-4 protocol number (IANA): 6 tcp, 17 udp."""

    protocol: int
    kind: Literal["protocol"] = "protocol"


class PortMatch(NamedTuple):
    """Source or destination port lies in a range (sorted, disjoint). The rule also has a ProtocolMatch of 6 or 17.

    One range is the xt `tcp`/`udp` match, more are `multiport` (at most 15 slots, a range takes two).
    """

    side: Side
    ranges: tuple[PortRange, ...]
    negate: bool = False
    kind: Literal["port"] = "port"


class SynMatch(NamedTuple):
    """A TCP segment that opens a connection: of SYN, ACK, FIN and RST it has SYN alone (iptables' `--syn`).

    The rule also has a ProtocolMatch of 6, and no PortMatch of one range: xt has one match for both.
    """

    kind: Literal["syn"] = "syn"


class OwnerMatch(NamedTuple):
    """The sending socket's uid or gid lies in first..last. Only where there is a socket: hook output."""

    id: Literal["uid", "gid"]
    first: int
    last: int
    negate: bool = False
    kind: Literal["owner"] = "owner"


class CgroupMatch(NamedTuple):
    """The sending socket's cgroup v2 is `path` (relative to the cgroup root, no leading slash) or below it.

    `id` is the inode number of the cgroup directory, which native nftables stores instead of the path. It cannot
    negate the match: nft_socket.c ends the rule for a socket whose cgroup is not as deep.
    """

    path: str
    id: int
    negate: bool = False
    kind: Literal["cgroup"] = "cgroup"


class MarkMatch(NamedTuple):
    """Packet mark & mask == value."""

    value: int
    mask: int = 0xFFFFFFFF
    negate: bool = False
    kind: Literal["mark"] = "mark"


class ConnmarkMatch(NamedTuple):
    """Connection mark & mask == value."""

    value: int
    mask: int = 0xFFFFFFFF
    negate: bool = False
    kind: Literal["connmark"] = "connmark"


class StateMatch(NamedTuple):
    """Connection tracking state is one of `states` (sorted)."""

    states: tuple[CtState, ...]
    kind: Literal["state"] = "state"


class SocketMatch(NamedTuple):
    """An established or non-wildcard socket with IP_TRANSPARENT exists for this packet (hook prerouting).

    Not `transparent`: any such socket, as Istio 1.4 asks.
    """

    transparent: bool = True
    kind: Literal["socket"] = "socket"


class LimitMatch(NamedTuple):
    """At most `rate` packets a minute, with a burst of `burst`."""

    rate: int
    burst: int = 5
    kind: Literal["limit"] = "limit"


Match: TypeAlias = (
    IfaceMatch | AddressMatch | SetMatch | ProtocolMatch | PortMatch | SynMatch | OwnerMatch | CgroupMatch
    | MarkMatch | ConnmarkMatch | StateMatch | SocketMatch | LimitMatch
)  # fmt: skip

# --- statements ----------------------------------------------------------------------------------------------


class Jump(NamedTuple):
    """Evaluate another chain of the same table, and come back."""

    chain: str
    kind: Literal["jump"] = "jump"


class Return(NamedTuple):
    """Back to the calling chain; in a base chain, its policy (accept)."""

    kind: Literal["return"] = "return"


class Accept(NamedTuple):
    """This hook is done with the packet, for this table."""

    kind: Literal["accept"] = "accept"


class Drop(NamedTuple):
    """The packet is gone."""

    kind: Literal["drop"] = "drop"


class Redirect(NamedTuple):
    """DNAT to this host at `port`. Terminal, in chains of type nat, with a ProtocolMatch of 6 or 17."""

    port: int
    kind: Literal["redirect"] = "redirect"


class Dnat(NamedTuple):
    """DNAT to an address (packed, 4 or 16 bytes) and port. Terminal, in chains of type nat."""

    address: bytes
    port: int
    kind: Literal["dnat"] = "dnat"


class TProxy(NamedTuple):
    """Hand the packet to a transparent socket at local `port`, and set mark/mask. Terminal, in mangle prerouting."""

    port: int
    mark: int
    mask: int = 0xFFFFFFFF
    kind: Literal["tproxy"] = "tproxy"


class SetMark(NamedTuple):
    """Packet mark = (mark & ~mask) ^ value, as MARK --set-xmark. Not terminal."""

    value: int
    mask: int = 0xFFFFFFFF
    kind: Literal["set-mark"] = "set-mark"


class SaveMark(NamedTuple):
    """Connection mark = packet mark, all 32 bits (CONNMARK --save-mark). Not terminal."""

    kind: Literal["save-mark"] = "save-mark"


class RestoreMark(NamedTuple):
    """Packet mark = connection mark, all 32 bits (CONNMARK --restore-mark). Not terminal."""

    kind: Literal["restore-mark"] = "restore-mark"


class SetConnmark(NamedTuple):
    """Connection mark = (mark & ~mask) ^ value, as CONNMARK --set-xmark. Not terminal."""

    value: int
    mask: int = 0xFFFFFFFF
    kind: Literal["set-connmark"] = "set-connmark"


class SetZone(NamedTuple):
    """Conntrack zone 0..65535, in the raw table, before tracking. The first one counts. Not terminal."""

    zone: int
    kind: Literal["set-zone"] = "set-zone"


class Log(NamedTuple):
    """Log to the kernel log with `prefix` (at most 29 characters). Not terminal."""

    prefix: str
    kind: Literal["log"] = "log"


Statement: TypeAlias = (
    Jump | Return | Accept | Drop | Redirect | Dnat | TProxy | SetMark | SaveMark | RestoreMark | SetConnmark
    | SetZone | Log
)  # fmt: skip
Terminal: TypeAlias = Return | Accept | Drop | Redirect | Dnat | TProxy

# --- rules, chains, tables -----------------------------------------------------------------------------------


class Rule(NamedTuple):
    """All `matches` hold, then `statement` happens. Every rule counts packets and bytes.

    `family` narrows a rule of an inet table to one family; in ip and ip6 tables it is None.
    `comment` is stored in the kernel (at most 127 bytes, printable ASCII); `path` is the plan path that the
    rule comes from, is not stored, and does not take part in comparison.
    """

    matches: tuple[Match, ...]
    statement: Statement
    family: Family | None = None
    comment: str = ""
    path: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self[:4] == other[:4]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:4])


class Base(NamedTuple):
    """What makes a chain a base chain: where the kernel calls it. Priorities are those of linux/netfilter_ipv4.h."""

    type: ChainType
    hook: Hook
    priority: int


class Chain(NamedTuple):
    """A chain of ours, or our part of a built-in chain.

    In the iptables dialects a chain with `base` is built in and shared: `head` are our rules before everybody
    else's, `rules` ours after. In native nftables the whole chain is ours and `head` is empty.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    base: Base | None = None
    head: tuple[Rule, ...] = ()


class Table(NamedTuple):
    """A table of one family. iptables dialects: nat, mangle, raw, filter of ip and ip6. Native: one inet table."""

    family: TableFamily
    name: str
    chains: tuple[Chain, ...]


class NamedSet(NamedTuple):
    """A set of address blocks of one family, sorted and without overlaps. The name ends in a hash of the content."""

    name: str
    family: Family
    elements: tuple[Cidr, ...]


class PolicyRule(NamedTuple):
    """`ip rule`: packets with mark & mask == value are routed by `table`. `priority` is the rule's preference."""

    family: Family
    mark: int
    mask: int
    table: int
    priority: int


class LocalRoute(NamedTuple):
    """`ip route add local default dev lo table N`: what TPROXY needs to deliver packets for foreign addresses."""

    family: Family
    table: int


class LocalAddress(NamedTuple):
    """An address on `lo`, full prefix length."""

    packed: bytes

    def __str__(self) -> str:
        return str(Cidr(self.packed, len(self.packed) * 8))


class Sysctl(NamedTuple):
    """A setting under /proc/sys, as `net.ipv4.conf.eth0.route_localnet`. Slashes stand for dots inside a name."""

    name: str
    value: str


class Routing(NamedTuple):
    """What stands beside the rules, in the order in which it is put up."""

    rules: tuple[PolicyRule, ...] = ()
    routes: tuple[LocalRoute, ...] = ()
    addresses: tuple[LocalAddress, ...] = ()
    sysctls: tuple[Sysctl, ...] = ()


class Ruleset(NamedTuple):
    """Everything that one plan puts into one namespace, for one kind of dialect."""

    tables: tuple[Table, ...] = ()
    sets: tuple[NamedSet, ...] = ()

    def walk(self) -> Iterator[tuple[Table, Chain, int, Rule]]:
        """Every rule with its table, chain and index; `head` first, as the kernel meets them."""
        for table in self.tables:
            for chain in table.chains:
                for index, rule in enumerate(chain.head + chain.rules):
                    yield table, chain, index, rule
