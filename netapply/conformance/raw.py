"""Segments that conntrack finds invalid: a SYN and ACK that answers nothing.

Sent by raw sockets of the remote side, which see the reset of whoever gets one (RFC 9293, 3.10.7.2).
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Mapping
from functools import partial

from netapply.conformance.case import Probe, Seen
from netapply.conformance.world import AF, BY_DEVICE, World, source_of
from netapply.lab.actors import SO_MARK, bind_anywhere

_SEGMENT = struct.Struct("!HHIIBBHHH")  # ports, sequence, acknowledgment, data offset, flags, window, checksum, urgent
_SYN_ACK, _RST = 0x12, 0x04
_IPV6_CHECKSUM = 7  # linux/in6.h
_FIRST_PORT = 33000


def send_invalid(world: World, probes: Mapping[int, Probe], quiet: float) -> dict[int, Seen]:
    """Send one segment for each probe: "answered" where a reset came back within `quiet` seconds, else "silent"."""
    sockets = {at: world.remote.inside(partial(_open, probe)) for at, probe in probes.items()}
    try:
        for at, sock in sockets.items():
            probe = probes[at]
            sock.send(_segment(probe, _FIRST_PORT + at))
        return _await_resets(probes, sockets, quiet)
    finally:
        for sock in sockets.values():
            sock.close()


def _open(probe: Probe) -> socket.socket:
    sock = socket.socket(AF[probe.family], socket.SOCK_RAW, socket.IPPROTO_TCP)
    try:
        sock.settimeout(0)
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, BY_DEVICE[probe.device].mark)
        if probe.family == "ip6":
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, 16)
        bind_anywhere(sock, (source_of(probe), 0))
        sock.connect((probe.to, 0))
    except BaseException:
        sock.close()
        raise
    return sock


def _await_resets(probes: Mapping[int, Probe], sockets: Mapping[int, socket.socket], quiet: float) -> dict[int, Seen]:
    seen = {at: Seen("silent") for at in probes}
    until = time.monotonic() + quiet
    waiting = dict(sockets)
    while waiting and (left := until - time.monotonic()) > 0:
        ready, _, _ = select.select([*waiting.values()], [], [], left)
        for at in [at for at, sock in waiting.items() if sock in ready]:
            probe, packet = probes[at], waiting[at].recv(256)
            segment = packet[(packet[0] & 15) * 4 :] if probe.family == "ip" else packet
            sport, dport, _, _, _, flags, _, _, _ = _SEGMENT.unpack_from(segment)
            if (sport, dport) == (probe.port, _FIRST_PORT + at) and flags & _RST:
                seen[at] = Seen("answered", "pod", probe.port, (probe.to, probe.port))
                del waiting[at]
    return seen


def _segment(probe: Probe, sport: int) -> bytes:
    def packed(checksum: int) -> bytes:
        return _SEGMENT.pack(sport, probe.port, 1, 1, _SEGMENT.size // 4 << 4, _SYN_ACK, 1024, checksum, 0)

    if probe.family == "ip6":  # the kernel fills it in
        return packed(0)
    ends = socket.inet_aton(source_of(probe)) + socket.inet_aton(probe.to)
    whole = ends + struct.pack("!HH", socket.IPPROTO_TCP, _SEGMENT.size) + packed(0)
    total = sum(struct.unpack(f"!{len(whole) // 2}H", whole))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return packed(~total & 0xFFFF)
