"""TCP connections that are there already, by sock_diag(7). NAT decides on a flow's first packet, so these stay.

What is told is an estimate by addresses, ports and uid: the kernel gives neither the group nor the interface.
"""

from __future__ import annotations

import struct

from netapply.evaluate import evaluate
from netapply.flow import TCP, UDP, Flow
from netapply.kernel import NETLINK_SOCK_DIAG, Kernel
from netapply.rtnetlink import local_addresses
from netapply.ruleset import Ruleset
from netapply.values import NamedTuple

# linux/sock_diag.h, linux/inet_diag.h
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_DONE, _NLMSG_ERROR = 3, 2
_ESTABLISHED, _LISTEN = 1, 10  # net/tcp_states.h
_ANY = 0xFFF  # every state but that of a connection to come
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2: family, protocol, extensions, states, (socket id)
_MESSAGE = struct.Struct("=BBxx2s2s16s16s4x8x12xII")  # struct inet_diag_msg: …, ports, addresses, …, uid, inode
_FAMILIES = {2: 4, 10: 16}  # AF_INET, AF_INET6: length of an address
#: The file that counts the sockets of a family, and what stands before the number.
_COUNTED = {2: ("net/sockstat", "\nTCP: inuse "), 10: ("net/sockstat6", "TCP6: inuse ")}


class Connection(NamedTuple):
    """An established one that did not come over `lo`: both ends, and the inode of our socket."""

    far: bytes
    far_port: int
    here: bytes
    port: int
    inode: int


def connections(kernel: Kernel) -> tuple[Connection, ...]:
    """Every established TCP connection of the namespace with somebody else. Raises KernelError."""
    found = [
        Connection(destination, dport, source, sport, inode)
        for family, size in _FAMILIES.items()
        for state, sport, dport, source, destination, _, inode in _sockets(kernel, family, size)
        if state == _ESTABLISHED
    ]
    own = {each.here for each in found}
    return tuple(each for each in found if each.far not in own and each.far[0] != 127)


def existing_flows(kernel: Kernel) -> tuple[Flow, ...]:
    """The first packets, as they must have been, of every established TCP connection of the namespace."""
    listening: set[int] = set()
    established: list[tuple[int, int, bytes, bytes, int]] = []
    for family, size in _FAMILIES.items():
        if not _in_use(kernel, family):
            continue
        for state, sport, dport, source, destination, uid, _ in _sockets(kernel, family, size):
            if state == _LISTEN:
                listening.add(sport)
            else:
                established.append((sport, dport, source, destination, uid))
    ours = {source for _, _, source, _, _ in established}
    flows: list[Flow] = []
    for sport, dport, source, destination, uid in established:
        looped = destination in ours or destination[0] == 127
        if sport not in listening:
            flows.append(Flow("outbound", TCP, source, destination, sport, dport, "lo" if looped else "", uid))
        elif not looped:
            flows.append(Flow("inbound", TCP, destination, source, dport, sport, ""))
    return tuple(flows)


def socket_owners(kernel: Kernel) -> tuple[dict[tuple[int, int], int], frozenset[bytes]]:
    """The uid of each TCP and UDP socket by protocol and local port, and the addresses of the namespace."""
    owners: dict[tuple[int, int], int] = {}
    for family, size in _FAMILIES.items():
        for protocol in (TCP, UDP):
            for state, sport, _, _, _, uid, _ in _sockets(kernel, family, size, protocol, _ANY):
                if state != _LISTEN:
                    owners[protocol, sport] = uid
    return owners, frozenset(local_addresses(kernel))


def _in_use(kernel: Kernel, family: int) -> bool:
    """Whether the namespace has TCP sockets of this family, as its own count says (net/ipv4/proc.c).

    Counting is at hand, while sock_diag walks the table of connections that all namespaces share.
    """
    name, line = _COUNTED[family]
    try:
        told = kernel.read_file(name)
    except OSError:
        return True  # without /proc/net nobody counts for us
    _, found, rest = told.partition(line)
    return not found or not rest.startswith("0")


def treated_otherwise(flows: tuple[Flow, ...], before: Ruleset | None, after: Ruleset | None) -> int:
    """How many of these flows would have another fate if they began now."""
    old, new = before or Ruleset(), after or Ruleset()
    return sum(not evaluate(old, flow).decision.same_as(evaluate(new, flow).decision) for flow in flows)


def _sockets(
    kernel: Kernel, family: int, size: int, protocol: int = TCP, states: int = 1 << _ESTABLISHED | 1 << _LISTEN
) -> list[tuple[int, int, int, bytes, bytes, int, int]]:
    body = _REQUEST.pack(family, protocol, 0, states)
    header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    found: list[tuple[int, int, int, bytes, bytes, int, int]] = []
    for data in kernel.netlink(NETLINK_SOCK_DIAG, header + body):
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
            if kind == _SOCK_DIAG_BY_FAMILY and length >= _HEADER.size + _MESSAGE.size:
                _, state, sport, dport, source, destination, *owner = _MESSAGE.unpack_from(data, offset + _HEADER.size)
                ends = _plain(source[:size]), _plain(destination[:size])
                found.append((state, int.from_bytes(sport), int.from_bytes(dport), *ends, *owner))
            offset += max((length + 3) & ~3, _HEADER.size)
    return found


def _plain(packed: bytes) -> bytes:
    """An IPv4 address that a dual-stack socket shows as IPv6, as the IPv4 address that its packets carry."""
    return packed[12:] if packed.startswith(b"\0" * 10 + b"\xff\xff") else packed
