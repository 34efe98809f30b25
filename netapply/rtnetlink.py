"""The little of rtnetlink(7) that every plan needs: addresses, and whether policy rules of ours stand.

Rules and routes themselves are pyroute2's (`netapply.policy`); importing that costs more than a whole apply, and
most plans have none.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from sys import byteorder

from netapply.errors import DecodeError, KernelError
from netapply.kernel import NETLINK_ROUTE, Kernel
from netapply.sockets import socket

#: `lo` has this index in every network namespace (net/core/dev.c reserves it: LOOPBACK_IFINDEX).
LOOPBACK_INDEX = 1
#: IFA_PROTO of the addresses that we add: who put them there. Linux before 5.18 neither keeps nor tells it.
ADDRESS_PROTOCOL = 0x6E

#: Seconds to wait for the route of a new address.
PATIENCE = 0.25
#: Seconds of these in which the processor is only offered to others.
YIELDING = 0.002

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port id
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, interface index
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, destination and source length, …, type, flags
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_ERROR = struct.Struct("=i")
_RULE_SIZE = 12  # struct fib_rule_hdr
_NLMSG_ERROR = 2
_MAX_ERRNO = 4095  # linux/err.h
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR, _RTM_NEWRULE, _RTM_GETRULE = 20, 21, 22, 32, 34
_RTM_NEWROUTE, _RTM_GETROUTE, _RTN_LOCAL, _RTA_DST = 24, 26, 2, 1
_REQUEST, _ACK, _EXCL, _CREATE, _DUMP = 0x1, 0x4, 0x200, 0x400, 0x300
_IFA_ADDRESS, _IFA_LOCAL, _IFA_PROTO, _FRA_PRIORITY = 1, 2, 11, 6
_ACK_TLVS, _NLMSGERR_MSG = 0x200, 1
_SEQUENCE = 1  # a socket has one request at a time


def loopback_addresses(kernel: Kernel) -> Iterator[tuple[bytes, int]]:
    """Each single address on `lo`, packed, with the protocol that put it there (0 where it is not known)."""
    for index, prefix, packed, protocol in _addresses(kernel):
        if index == LOOPBACK_INDEX and prefix == 8 * len(packed):
            yield packed, protocol


def local_addresses(kernel: Kernel) -> Iterator[bytes]:
    """Every address of every interface, packed, in the kernel's order, IPv4 first: as Go's net.InterfaceAddrs."""
    for _, _, packed, _ in _addresses(kernel):
        yield packed


def _addresses(kernel: Kernel) -> tuple[tuple[int, int, bytes, int], ...]:
    """Each address: interface index, prefix length, packed, protocol."""
    return _read_addresses(tuple(_ask(kernel, "list addresses", _LIST_ADDRESSES)))


# The same is read before and after most changes, so what it says is known by its bytes.


@lru_cache(8)
def _read_addresses(answer: tuple[bytes, ...]) -> tuple[tuple[int, int, bytes, int], ...]:
    listed: list[tuple[int, int, bytes, int]] = []
    for data, offset, end in _messages(answer, _RTM_NEWADDR, _ADDRESS.size):
        _, prefix, _, _, index = _ADDRESS.unpack_from(data, offset)
        found = dict(_attributes(data, offset + _ADDRESS.size, end))
        packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS, b"")
        listed.append((index, prefix, packed, int.from_bytes(found.get(_IFA_PROTO, b""))))
    return tuple(listed)


def change_address(kernel: Kernel, operation: str, packed: bytes, *, add: bool) -> None:
    """Add an address to `lo`, or delete it. Raises KernelError: EEXIST, EADDRNOTAVAIL where there is nothing to do."""
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    body = _ADDRESS.pack(family, 8 * len(packed), 0, 0, LOOPBACK_INDEX) + _attribute(_IFA_LOCAL, packed)
    if add:
        body += _attribute(_IFA_PROTO, bytes([ADDRESS_PROTOCOL]))
        request = _message(_RTM_NEWADDR, _ACK | _CREATE | _EXCL, body)
    else:
        request = _message(_RTM_DELADDR, _ACK, body)
    _ask(kernel, operation, request)
    if add and family == socket.AF_INET6:
        _await_local(kernel, operation, packed)


def _await_local(kernel: Kernel, operation: str, packed: bytes) -> None:
    """Wait until packets to the address are delivered here. The kernel adds the route a moment after it acknowledged.

    net/ipv6/addrconf.c: addrconf_dad_work, a work item, notifies __ipv6_ifa_notify, which inserts the route: mostly at
    once, up to 20 ms later on a busy machine. Goes on after PATIENCE: while `lo` is down there is no route.
    """
    body = _ROUTE.pack(socket.AF_INET6, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0) + _attribute(_RTA_DST, packed)
    request = _message(_RTM_GETROUTE, 0, body)
    begun = time.monotonic()
    while (waited := time.monotonic() - begun) < PATIENCE:
        found = _messages(_ask(kernel, operation, request, missing=True), _RTM_NEWROUTE, _ROUTE.size)
        if any(_ROUTE.unpack_from(data, offset)[7] == _RTN_LOCAL for data, offset, _ in found):
            return
        # It runs as soon as somebody lets it, in microseconds; a sleep takes longer than most of these waits.
        if waited < YIELDING:
            os.sched_yield()
        else:
            time.sleep(0.0002)


def rule_priorities(kernel: Kernel) -> frozenset[int]:
    """The preferences of all policy rules of all families."""
    return _read_priorities(tuple(_ask(kernel, "list policy rules", _LIST_RULES)))


@lru_cache(8)
def _read_priorities(answer: tuple[bytes, ...]) -> frozenset[int]:
    found: set[int] = set()
    for data, offset, end in _messages(answer, _RTM_NEWRULE, _RULE_SIZE):
        priority = dict(_attributes(data, offset + _RULE_SIZE, end)).get(_FRA_PRIORITY)
        if priority:
            found.add(int.from_bytes(priority, byteorder))
    return frozenset(found)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, _SEQUENCE, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
    while offset + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        yield kind & 0x3FFF, data[offset + _ATTRIBUTE.size : min(offset + length, end)]
        offset += max((length + 3) & ~3, _ATTRIBUTE.size)


_LIST_ADDRESSES = _message(_RTM_GETADDR, _DUMP, _ADDRESS.pack(0, 0, 0, 0, 0))
_LIST_RULES = _message(_RTM_GETRULE, _DUMP, bytes(_RULE_SIZE))


def _ask(kernel: Kernel, operation: str, request: bytes, *, missing: bool = False) -> list[bytes]:
    """The answer to one request; KernelError, in the kernel's words, if it is an error and may not be `missing`."""
    try:
        answer = kernel.netlink(NETLINK_ROUTE, request)
    except OSError as error:
        raise KernelError(operation, error.errno or 0) from error
    for data, offset, end in _messages(answer, _NLMSG_ERROR, _ERROR.size):
        code = -_ERROR.unpack_from(data, offset)[0]
        if not 0 <= code <= _MAX_ERRNO:
            raise DecodeError(f"{operation}: a netlink error message with the error number {code}")
        if code and not missing:
            raise KernelError(operation, code, extack=_explanation(data, offset, end))
    return answer


def _explanation(data: bytes, offset: int, end: int) -> str:
    _, _, flags, _, _ = _HEADER.unpack_from(data, offset - _HEADER.size)
    if not flags & _ACK_TLVS:
        return ""
    # NETLINK_CAP_ACK: the header of our request stands between the error and the attributes, and not its body.
    words = dict(_attributes(data, offset + _ERROR.size + _HEADER.size, end)).get(_NLMSGERR_MSG, b"")
    return words.rstrip(b"\0").decode("ascii", "replace")


def _messages(answer: Sequence[bytes], wanted: int, least: int) -> Iterator[tuple[bytes, int, int]]:
    """Of each message of one type: the datagram, and where in it the body, of `least` bytes or more, begins and ends.

    Raises DecodeError.
    """
    for data in answer:
        offset, size = 0, len(data)
        while offset + _HEADER.size <= size:
            length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
            after = offset + length
            if length < _HEADER.size or after > size or (kind == wanted and length < _HEADER.size + least):
                raise DecodeError(f"a netlink message of {length} bytes does not fit in the {size - offset} there are")
            if kind == wanted:
                yield data, offset + _HEADER.size, after
            offset += (length + 3) & ~3
