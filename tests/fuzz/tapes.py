"""What a kernel answered, recorded, and played to a decoder again: each answer is one piece of an input."""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from netapply.kernel import NetlinkProtocol, Scratch
from netapply.namespace import Namespace
from netapply.ruleset import Family

T = TypeVar("T")
Input = tuple[bytes, ...]

_NETLINK, _OPTION, _FILE, _ERROR = b"N", b"O", b"F", b"E"
_LENGTH = struct.Struct("<I")


class Recording(Namespace):
    """A namespace that writes down what its kernel answers."""

    tape: list[bytes]

    def netlink(self, protocol: NetlinkProtocol, request: bytes) -> list[bytes]:
        answer = super().netlink(protocol, request)
        self.tape.append(_NETLINK + b"".join(_LENGTH.pack(len(each)) + each for each in answer))
        return answer

    def getsockopt(self, family: Family, option: int, buffer: bytes, level: int | None = None) -> bytes:
        try:
            answer = super().getsockopt(family, option, buffer, level)
        except OSError as error:
            self.tape.append(_ERROR + bytes([error.errno or errno.EIO]))
            raise
        self.tape.append(_OPTION + answer)
        return answer

    def read_file(self, path: str) -> str:
        try:
            answer = super().read_file(path)
        except OSError as error:
            self.tape.append(_ERROR + bytes([error.errno or errno.EIO]))
            raise
        self.tape.append(_FILE + answer.encode("ascii", "surrogateescape"))
        return answer


class Replay:
    """A `Kernel` that answers from a tape, whatever it is asked; with EIO when the tape is at its end."""

    lock_timeout = 0.1

    def __init__(self, tape: Sequence[bytes]) -> None:
        self._left = deque(tape)
        self.memory: dict[str, object] = {}

    def _next(self) -> bytes:
        piece = self._left.popleft() if self._left else _ERROR
        if piece[:1] == _ERROR:
            number = piece[1] if len(piece) > 1 else errno.EIO
            raise OSError(number, os.strerror(number))
        return piece[1:]

    def netlink(self, protocol: NetlinkProtocol, request: bytes) -> list[bytes]:
        data = self._next()
        answer: list[bytes] = []
        at = 0
        while at + 4 <= len(data):
            size = _LENGTH.unpack_from(data, at)[0]
            answer.append(data[at + 4 : at + 4 + size])
            at += 4 + size
        return answer

    def getsockopt(self, family: Family, option: int, buffer: bytes, level: int | None = None) -> bytes:
        return self._next()[: len(buffer)]  # the kernel never writes more than it was given room for

    def setsockopt(self, family: Family, option: int, blob: bytes, scratch: Scratch | None = None) -> bytes:
        self._next()
        return bytes(scratch.size) if scratch else b""

    def read_file(self, path: str) -> str:
        return self._next().decode("ascii", "surrogateescape")

    def write_file(self, path: str, value: str) -> None:
        self._next()

    def inside(self, work: Callable[[], T]) -> T:
        return work()
