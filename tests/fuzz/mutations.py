"""Changes of an input, most of which keep its shape: bytes are overwritten in place, attributes and words exchanged."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

from tests.fuzz.tapes import Input

_ATTRIBUTE = struct.Struct("=HH")
_ODD = (0, 1, 2, 3, 4, 5, 7, 8, 0x7F, 0x80, 0xFE, 0xFF)
_WIDE = (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
LONGEST = 1 << 16


def mutate(chance: random.Random, pieces: Input, others: Sequence[Input], words: Sequence[bytes]) -> Input:
    """A neighbour of `pieces`: one to four changes, mostly of one piece."""
    changed = list(pieces)
    if len(changed) > 1 and chance.random() < 0.05:
        _shuffle(chance, changed)
    at = chance.randrange(len(changed))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if chance.random() < 0.1:
            at = chance.randrange(len(changed))
        other = chance.choice(chance.choice(others))
        data = bytearray(changed[at])
        chance.choice(_CHANGES)(chance, data, other, words)
        changed[at] = bytes(data[:LONGEST])
    return tuple(changed)


def _shuffle(chance: random.Random, pieces: list[bytes]) -> None:
    one, other = chance.randrange(len(pieces)), chance.randrange(len(pieces))
    if chance.random() < 0.5 and len(pieces) > 1:
        del pieces[one]
    else:
        pieces[one], pieces[other] = pieces[other], pieces[one]


Change = Callable[[random.Random, bytearray, bytes, Sequence[bytes]], None]


def _flip(chance: random.Random, data: bytearray, _other: bytes, _words: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _overwrite(chance: random.Random, data: bytearray, _other: bytes, _words: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.choice(_ODD) if chance.random() < 0.7 else chance.randrange(256)


def _number(chance: random.Random, data: bytearray, _other: bytes, _words: Sequence[bytes]) -> None:
    if len(data) >= 4:
        at = chance.randrange(len(data) - 3) & ~3
        width = chance.choice((2, 4))
        value = chance.choice(_WIDE) & ((1 << 8 * width) - 1)
        data[at : at + width] = value.to_bytes(width, chance.choice(("big", "little")))


def _cut(chance: random.Random, data: bytearray, _other: bytes, _words: Sequence[bytes]) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _remove(chance: random.Random, data: bytearray, _other: bytes, _words: Sequence[bytes]) -> None:
    at = chance.randrange(len(data) + 1)
    del data[at : at + chance.choice((1, 2, 4, 8, 40))]


def _repeat(chance: random.Random, data: bytearray, _other: bytes, _words: Sequence[bytes]) -> None:
    at = chance.randrange(len(data) + 1)
    part = bytes(data[at : at + chance.choice((1, 4, 8, 40, 200))])
    data[at:at] = part * chance.choice((1, 1, 2, 50))


def _splice(chance: random.Random, data: bytearray, other: bytes, _words: Sequence[bytes]) -> None:
    at, source, size = chance.randrange(len(data) + 1), chance.randrange(len(other) + 1), chance.choice((4, 16, 64))
    data[at : at + size] = other[source : source + size]


def _insert(chance: random.Random, data: bytearray, _other: bytes, words: Sequence[bytes]) -> None:
    if words:
        at, word = chance.randrange(len(data) + 1), chance.choice(words)
        data[at : at + chance.choice((0, len(word)))] = word


def _attribute(chance: random.Random, data: bytearray, _other: bytes, words: Sequence[bytes]) -> None:
    """Change one netlink attribute: what it says, its type, or its length, so that the rest is still found."""
    for _ in range(16):
        if len(data) < 8:
            return
        at = chance.randrange(0, len(data) - 3)
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if 4 <= size <= min(len(data) - at, 512) and kind & 0x3FFF < 64:
            break
    else:
        return
    match chance.randrange(5):
        case 0:
            data[at + 4 : at + size] = bytes(chance.choice(_ODD) for _ in range(size - 4))
        case 1:
            _ATTRIBUTE.pack_into(data, at, size, chance.randrange(32))
        case 2:
            _ATTRIBUTE.pack_into(data, at, chance.randrange(4, size + 1), kind)
        case 3:
            data[at + 4 : at + size] = bytes(size - 4)
        case _ if words:
            data[at + 4 : at + size] = chance.choice(words)[: size - 4].ljust(size - 4, b"\0")
        case _:
            pass


_CHANGES: tuple[Change, ...] = (
    _flip, _overwrite, _overwrite, _number, _cut, _remove, _repeat, _splice, _insert, _insert, _attribute, _attribute,
)  # fmt: skip
