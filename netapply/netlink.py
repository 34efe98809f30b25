"""One netlink socket: opened, and one request at a time answered. It knows the header of a message, and no body."""

from __future__ import annotations

import errno
import os
import select
import struct
import time

from netapply.kernel import NETLINK_NETFILTER, NetlinkProtocol
from netapply.sockets import socket

#: Seconds that an answer may take. The kernel answers inside sendmsg(2), so this is for a kernel that does not.
DEADLINE = 5.0

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port id
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_ERROR_TYPE, _NOT_PERMITTED = struct.pack("=H", _NLMSG_ERROR), struct.pack("=i", -errno.EPERM)
_NLM_F_ACK, _NLM_F_DUMP = 0x4, 0x300
_NFNL_MSG_BATCH_BEGIN = 0x10
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_RECEIVE_BUFFER = 4 << 20  # a limit, not memory: room for some 4,000 acknowledgements
_SEND_BUFFER = 200_000  # just below the kernel's default
# As plain numbers: those of `socket` are enums, and each & of one takes longer than the system call.
_MSG_TRUNC, _MSG_DONTWAIT = 0x20, 0x40
_DATAGRAM = 1 << 16  # dumps come in at most 32 KiB, and a set element's attribute ends below 64 KiB


def open_netlink(protocol: NetlinkProtocol) -> socket.socket:
    """A netlink socket in the calling thread's namespace, with short acknowledgements that explain themselves."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
    sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
    _resize(sock, _SO_RCVBUFFORCE, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    # To a socket that is connected with the kernel nobody else can send (af_netlink.c: netlink_getsockbyportid), so
    # that no flood of forged answers can fill its buffer.
    sock.connect((0, 0))
    return sock


def _resize(sock: socket.socket, force: int, plain: int, size: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:  # in a user namespace, before Linux 6.1
        sock.setsockopt(socket.SOL_SOCKET, plain, size)


def exchange(sock: socket.socket, protocol: NetlinkProtocol, request: bytes) -> list[bytes]:
    """Send `request` and return every datagram of the kernel's answer.

    The kernel handles a request inside sendmsg(2) and goes on with a dump inside recvmsg(2), so what is to come is
    there already. A batch is answered when nothing more is there; others when each message that asked for it was
    acknowledged, its dump is done, or, where it asked for neither, one message came. Raises OSError, after which the
    socket is good for nothing but to be closed: ENOBUFS where answers were lost, TimeoutError past the deadline.
    """
    awaited = _awaited(protocol, request)
    if len(request) > _SEND_BUFFER:
        size = min(16 * len(request), 1 << 29)
        _resize(sock, _SO_SNDBUFFORCE, socket.SO_SNDBUF, len(request))
        _resize(sock, _SO_RCVBUFFORCE, socket.SO_RCVBUF, max(size, _RECEIVE_BUFFER))
    sock.send(request)
    draining = not awaited
    deadline = 0.0
    answer: list[bytes] = []
    while draining or awaited:
        try:
            data, _, flags, sender = sock.recvmsg(_DATAGRAM, 0, _MSG_DONTWAIT)
        except BlockingIOError:
            if draining:
                break
            deadline = deadline or time.monotonic() + DEADLINE
            _wait(sock, deadline)
            continue
        if sender[0]:
            continue  # another process of the namespace: only port id 0 is the kernel
        if flags & _MSG_TRUNC:
            raise OSError(errno.ENOBUFS, "a netlink answer was cut off")
        answer.append(data)
        if awaited:
            _settle(data, awaited)
            # nfnetlink.c, nfnetlink_rcv: who may not is told once, whatever else the datagram asks.
            if protocol == NETLINK_NETFILTER and data[4:6] == _ERROR_TYPE and data[16:20] == _NOT_PERMITTED:
                break
    return answer


def _awaited(protocol: NetlinkProtocol, request: bytes) -> dict[int, bool]:
    """By the sequence numbers of the messages, whether the first answer is the last; none for a batch.

    Others end in an acknowledgement or NLMSG_DONE.
    """
    _, kind, _, _, _ = _HEADER.unpack_from(request)
    if protocol == NETLINK_NETFILTER and kind == _NFNL_MSG_BATCH_BEGIN:
        return {}
    found: dict[int, bool] = {}
    offset = 0
    while offset < len(request):
        length, _, flags, sequence, _ = _HEADER.unpack_from(request, offset)
        found[sequence] = not (flags & _NLM_F_ACK or flags & _NLM_F_DUMP == _NLM_F_DUMP)
        offset += max((length + 3) & ~3, _HEADER.size)
    return found


def _settle(data: bytes, awaited: dict[int, bool]) -> None:
    offset, end = 0, len(data) - _HEADER.size
    while offset <= end:
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
        if kind in (_NLMSG_ERROR, _NLMSG_DONE) or awaited.get(sequence):
            awaited.pop(sequence, None)
        offset += max((length + 3) & ~3, _HEADER.size)


def _wait(sock: socket.socket, deadline: float) -> None:
    readable = select.poll()
    readable.register(sock, select.POLLIN)
    if not readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
