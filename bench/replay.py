"""The recorded bytes once more, over sockets that stay open: what the kernel alone takes for them."""

from __future__ import annotations

import ctypes
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from bench.recording import Message, Option, Request
from netapply.kernel import NetlinkProtocol
from netapply.netlink import open_netlink
from netapply.ruleset import Family

Call: TypeAlias = Callable[[], None]

LEVEL: dict[Family, int] = {"ip": socket.SOL_IP, "ip6": socket.IPPROTO_IPV6}
_FAMILY: dict[Family, int] = {"ip": socket.AF_INET, "ip6": socket.AF_INET6}
_NLMSG_ERROR = 2
_SUBSYSTEM_AT, _IPSET = 5, 6  # the upper byte of a little-endian nlmsg_type; NFNL_SUBSYS_IPSET
_STILL_USED = (4100, 4108)  # IPSET_ERR_BUSY, IPSET_ERR_REFERENCED
_MESSAGE = struct.Struct("=IHHIIi")  # struct nlmsghdr, and the error of struct nlmsgerr
_POINTER = struct.Struct("P")
_libc = ctypes.CDLL(None, use_errno=True)
_setsockopt = _libc.setsockopt
_setsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)


class Sockets:
    """The sockets of one namespace, opened in it by the calling thread."""

    def __init__(self, needed: Sequence[Request]) -> None:
        protocols: set[NetlinkProtocol] = {each.protocol for each in needed if isinstance(each, Message)}
        families: set[Family] = {each.family for each in needed if isinstance(each, Option)}
        self.netlink = {protocol: open_netlink(protocol) for protocol in protocols}
        self.inet = {family: socket.socket(_FAMILY[family], socket.SOCK_DGRAM) for family in families}
        for sock in self.netlink.values():
            sock.setblocking(False)
            size = max((len(each.data) for each in needed if isinstance(each, Message)), default=0)
            if size > 200_000:  # the kernel's default takes no more
                sock.setsockopt(socket.SOL_SOCKET, 32, size)  # SO_SNDBUFFORCE

    def close(self) -> None:
        """Close all of them, at once."""
        for sock in (*self.netlink.values(), *self.inet.values()):
            sock.close()

    def calls(self, requests: Sequence[Request]) -> tuple[Call, ...]:
        """Each request as a call without arguments, everything about it prepared. It raises OSError if refused."""
        return tuple(
            _sender(self.netlink[each.protocol], each.data)
            if isinstance(each, Message)
            else _setter(self.inet[each.family].fileno(), each)
            for each in requests
        )


def play(calls: Sequence[Call]) -> None:
    """Do one after another."""
    for call in calls:
        call()


def _sender(sock: socket.socket, data: bytes) -> Call:
    send, receive = sock.send, sock.recv

    def call() -> None:
        send(data)
        try:
            while True:  # all answers are there when send comes back: acknowledgements, or errors, or none
                refuse_errors(receive(65536))
        except BlockingIOError:
            return

    return _patient(call) if data[_SUBSYSTEM_AT] == _IPSET else call


def _patient(call: Call) -> Call:
    """The same, again until it works: a set cannot go before the rules that use it, and nf_tables frees those later."""

    def until_free() -> None:
        for _ in range(1000):
            try:
                return call()
            except OSError as error:
                if error.errno not in _STILL_USED:
                    raise
            time.sleep(0.001)
        return call()

    return until_free


def refuse_errors(answer: bytes) -> None:
    """Raise OSError if there is an error message among the messages of a datagram."""
    offset = 0
    while offset + _MESSAGE.size <= len(answer):
        size, kind, _, _, _, code = _MESSAGE.unpack_from(answer, offset)
        if kind == _NLMSG_ERROR and code:
            raise OSError(-code, "a recorded request was refused")
        offset += (size + 3) & ~3


def _setter(fd: int, request: Option) -> Call:
    blob = ctypes.create_string_buffer(request.blob, len(request.blob))
    result = ctypes.create_string_buffer(request.scratch.size) if request.scratch else None
    if request.scratch and result is not None:
        _POINTER.pack_into(blob, request.scratch.offset, ctypes.addressof(result))
    return partial(_set, (fd, LEVEL[request.family], request.option, blob, len(request.blob)), result)


def _set(arguments: tuple[object, ...], _result: object) -> None:
    """Set an option. The kernel writes to the result, whose address is in the blob: so it has to be kept."""
    if _setsockopt(*arguments):
        raise OSError(ctypes.get_errno(), "a recorded socket option was refused")
