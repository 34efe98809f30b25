"""All that can be seen of a namespace but our rules: foreign rules, policy rules, routes, addresses. To be compared."""

from __future__ import annotations

import struct

from netapply.backend import Backend
from netapply.kernel import NETLINK_ROUTE, Kernel
from netapply.ownership import ownership
from netapply.values import NamedTuple

_HEADER = struct.Struct("=IHHII")
_REQUEST_DUMP = 0x301
#: linux/rtnetlink.h: what is asked, the size of its fixed part, and attributes that count or age.
_ADDRESSES, _ROUTES, _RULES = (22, 8, {6}), (26, 12, {12}), (34, 12, set[int]())
_NEW = {22: 20, 26: 24, 34: 32}  # RTM_GETADDR is answered by RTM_NEWADDR, and so on


class Picture(NamedTuple):
    """What there was, each part in a form that compares equal when it is unchanged."""

    foreign: object
    rules: tuple[bytes, ...]
    routes: tuple[bytes, ...]
    addresses: tuple[bytes, ...]

    def changes(self, later: Picture) -> tuple[str, ...]:
        """What is otherwise in a later picture, a phrase each."""
        return tuple(
            f"{name} are not as they were"
            for name, one, other in zip(
                ("foreign rules", "policy rules", "routes", "addresses"), self, later, strict=True
            )
            if one != other
        )


def picture(kernel: Kernel, backend: Backend, layout: str) -> Picture:
    """Look at the namespace; changes nothing. Raises NetapplyError."""
    foreign = backend.read(kernel, ownership(layout)).foreign
    return Picture(foreign, _dump(kernel, *_RULES), _dump(kernel, *_ROUTES), _dump(kernel, *_ADDRESSES))


def _dump(kernel: Kernel, kind: int, fixed: int, volatile: set[int]) -> tuple[bytes, ...]:
    found: list[bytes] = []
    for family in (2, 10):
        request = _HEADER.pack(_HEADER.size + fixed, kind, _REQUEST_DUMP, 1, 0) + bytes([family]) + bytes(fixed - 1)
        for data in kernel.netlink(NETLINK_ROUTE, request):
            at = 0
            while at + _HEADER.size <= len(data):
                length, said, _, _, _ = _HEADER.unpack_from(data, at)
                if said == _NEW[kind]:
                    found.append(_steady(data[at + _HEADER.size : at + length], fixed, volatile))
                at += max((length + 3) & ~3, _HEADER.size)
    return tuple(sorted(found))


def _steady(body: bytes, fixed: int, volatile: set[int]) -> bytes:
    """The message without attributes that count or age."""
    kept, at = body[:fixed], fixed
    while at + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, at)
        if length < 4:
            break
        if kind & 0x3FFF not in volatile:
            kept += body[at : at + length]
        at += (length + 3) & ~3
    return kept
