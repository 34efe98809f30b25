"""A network device whose other end is a descriptor of ours (linux/if_tun.h, Documentation/networking/tuntap.rst).

It is gone when that is closed, and so with the process.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
import time
from typing import Self

from netapply.values import NamedTuple

_TUNSETIFF = 0x400454CA
_TUN, _NO_PI = 1, 0x1000  # IFF_TUN, IFF_NO_PI
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCGIFINDEX = 0x8913, 0x8914, 0x8916, 0x891C, 0x8933
_UP = 1
_REQUEST = struct.Struct("=16s24s")  # struct ifreq
_ADDRESS = struct.Struct("=HH4s8x")  # struct sockaddr_in
_REQUEST6 = struct.Struct("=16sIi")  # struct in6_ifreq
_TCP = struct.Struct("!HHIIBBHHH")
_SYN, _RST = 2, 4
#: Seconds that an address of IPv6 may take until it can be used.
PATIENCE = 2.0


class Ends(NamedTuple):
    """The two addresses of the device in one family: the namespace's, and somebody's behind the device."""

    family: int
    own: str
    far: str

    @property
    def header(self) -> int:
        """Bytes before the transport header of a packet without options."""
        return 20 if self.family == 4 else 40


ADDRESSES = (Ends(4, "192.0.2.1", "192.0.2.2"), Ends(6, "2001:db8:6e61::1", "2001:db8:6e61::2"))


def packed(address: str) -> bytes:
    """As it is in packets."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


class Tun:
    """The device, in the network namespace of the calling thread. Raises OSError."""

    def __init__(self) -> None:
        self.name = f"canary{secrets.token_hex(3)}"
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("=16sH22x", self.name.encode(), _TUN | _NO_PI))
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def put_up(self) -> tuple[Ends, ...]:
        """Switch it on, and give it the addresses of the families that there are; returns these. Raises OSError."""
        name = self.name.encode()
        four = ADDRESSES[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            told = fcntl.ioctl(sock, _SIOCGIFFLAGS, _REQUEST.pack(name, b""))
            flags = struct.unpack_from("=H", told, 16)[0] | _UP
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("=16sH22x", name, flags))
            for request, value in ((_SIOCSIFADDR, packed(four.own)), (_SIOCSIFNETMASK, b"\xff\xff\xff\xfc")):
                body = _ADDRESS.pack(socket.AF_INET, 0, value)
                fcntl.ioctl(sock, request, _REQUEST.pack(name, body))
            index = struct.unpack_from("=i", fcntl.ioctl(sock, _SIOCGIFINDEX, _REQUEST.pack(name, b"")), 16)[0]
        return ADDRESSES if self._put_up_ipv6(ADDRESSES[1], index) else ADDRESSES[:1]

    def _put_up_ipv6(self, ends: Ends, index: int) -> bool:
        """False where there is no IPv6, or it is switched off."""
        try:
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                fcntl.ioctl(sock, _SIOCSIFADDR, _REQUEST6.pack(packed(ends.own), 126, index))
        except OSError:
            return False
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                    sock.bind((ends.own, 0))
                    return True
            except OSError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.002)

    def drain(self) -> list[bytes]:
        """All packets that have left by the device."""
        packets: list[bytes] = []
        try:
            while True:
                packets.append(os.read(self.fd, 65536))
        except BlockingIOError:
            return packets


def is_of(packet: bytes, ends: Ends, protocol: int, dport: int) -> bool:
    """Whether it goes from the namespace's end to this port of the other."""
    own, far, length = packed(ends.own), packed(ends.far), ends.header
    if len(packet) < length + 8 or packet[0] >> 4 != ends.family:
        return False
    addresses = packet[12:20] if ends.family == 4 else packet[8:40]
    kind = packet[9 if ends.family == 4 else 6]
    return addresses == own + far and kind == protocol and int.from_bytes(packet[length + 2 : length + 4]) == dport


def opening(ends: Ends, sport: int, dport: int) -> bytes:
    """A SYN from the far end."""
    return _segment(ends, sport, dport, 1000, 0, _SYN)


def refusal(ends: Ends, answer: bytes, sport: int, dport: int) -> bytes:
    """What ends the connection that `answer` has accepted."""
    acknowledged = int.from_bytes(answer[ends.header + 8 : ends.header + 12])
    return _segment(ends, sport, dport, acknowledged, 0, _RST)


def _segment(ends: Ends, sport: int, dport: int, sequence: int, acknowledged: int, flags: int) -> bytes:
    source, destination = packed(ends.far), packed(ends.own)
    tcp = _TCP.pack(sport, dport, sequence, acknowledged, 5 << 4, flags, 65535, 0, 0)
    pseudo = source + destination + struct.pack("!II", len(tcp), socket.IPPROTO_TCP)
    tcp = tcp[:16] + _sum(pseudo + tcp) + tcp[18:]
    if ends.family == 6:
        return struct.pack("!IHBB", 6 << 28, len(tcp), socket.IPPROTO_TCP, 64) + source + destination + tcp
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, socket.IPPROTO_TCP, 0) + source + destination
    return head[:10] + _sum(head) + head[12:] + tcp


def _sum(data: bytes) -> bytes:
    """The checksum of RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2)
