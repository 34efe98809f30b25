"""What a namespace holds, read by raw requests and without any decoder of netapply's: to be compared.

A picture maps each object to its content: tables, chains, the rules of a chain in order, sets with their elements, and
what stands beside the rules. Handles, use counts and what ages are left out, so that a state reached by another way is
the same. `foreign` keeps the handles and counters: who has these has not been touched.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from netapply.kernel import NETLINK_NETFILTER, NETLINK_ROUTE
from netapply.namespace import Namespace
from netapply.ruleset import Family

_HEADER = struct.Struct("=IHHII")
_DUMP = 0x301
_NFT, _IPSET = 10 << 8, 6 << 8
#: linux/netfilter/nf_tables.h: what is asked for, the attributes that name it, and those that age.
_TABLE, _CHAIN, _RULE, _SET, _ELEMENT = 1, 4, 7, 10, 13
_AGES = {_TABLE: {3, 4}, _CHAIN: {2, 6, 8, 11}, _RULE: {3, 6}, _SET: {10, 16}}
_WORDS = {_TABLE: "table", _CHAIN: "chain", _SET: "set"}
_NAME = {_CHAIN: 3, _SET: 2}
_HANDLE = {_TABLE: 4, _CHAIN: 2, _RULE: 3, _SET: 16}
#: struct ipt_entry, struct ip6t_entry: the place of target_offset, and of the counters.
_PLACES = {"ip": (88, 96), "ip6": (140, 152)}
#: linux/rtnetlink.h: what is asked for, the size of its fixed part, attributes that age, the type of the answer.
_ROUTING = {"addresses": (22, 8, {6}, 20), "routes": (26, 12, {12}, 24), "policy": (34, 12, set[int](), 32)}

#: struct nft_counter as an expression of a rule: linux/netfilter/nf_tables.h, NFTA_COUNTER_BYTES and _PACKETS.
_COUNTER = re.compile(rb"(counter\0\x1c\0\x02[\0\x80]\x0c\0\x01\0).{8}(\x0c\0\x02\0).{8}", re.DOTALL)

Key = tuple[str, ...]
Attributes = dict[int, bytes]


class Picture(NamedTuple):
    """`state` without handles; `foreign` of each object with handles, and each chain's rules in order."""

    state: Mapping[Key, object]
    exact: Mapping[Key, tuple[bytes, ...]]


def take(namespace: Namespace) -> Picture:
    """Look at all of it. Changes nothing."""
    state: dict[Key, object] = {}
    exact: dict[Key, tuple[bytes, ...]] = {}
    _nftables(namespace, state, exact)
    for family, level in (("ip", 0), ("ip6", 41)):
        for table in namespace.read_file(f"net/{family}_tables_names").split():
            _legacy(namespace, family, level, table, state, exact)
    _ipsets(namespace, state)
    for name, (kind, fixed, ages, _) in _ROUTING.items():
        found: list[bytes] = []
        for af in (2, 10):
            request = bytes([af]) + bytes(fixed - 1)
            for body in _dump(namespace, NETLINK_ROUTE, kind, request):
                kept = b"".join(_packed(k, v) for k, v in _walk(body[fixed:]) if k not in ages)
                found.append(body[:fixed] + kept)
        state[("routing", name)] = tuple(sorted(found))
        exact[("routing", name)] = tuple(sorted(found))
    return Picture(state, exact)


def lost(before: Picture, now: Picture, *, legacy_counters: bool = True, counters: bool = True) -> list[str]:
    """What was there before, to the handle, and is no more, or in another order: a line each."""

    def seen(key: Key, item: bytes) -> bytes:
        if key[0] == "legacy":
            return item if counters and legacy_counters else item[16:]
        return item if counters else _uncounted(item)

    gone: list[str] = []
    for key, items in before.exact.items():
        left = iter(now.exact.get(key, ()))
        for item in items:
            wanted = seen(key, item)
            if not any(seen(key, have) == wanted for have in left):
                gone.append(f"{' '.join(key)}: {item[:60].hex()}")
                break
    return gone


def _uncounted(rule: bytes) -> bytes:
    return _COUNTER.sub(lambda found: found[1] + bytes(8) + found[2] + bytes(8), rule)


def zeroed(before: Picture, now: Picture) -> bool:
    """Whether a rule of iptables-legacy counted more before than now."""
    return any(
        not {rule[:16] for rule in rules if key[0] == "legacy" and any(rule[:16])}
        <= {rule[:16] for rule in now.exact.get(key, ())}
        for key, rules in before.exact.items()
    )


def difference(one: Picture, other: Picture) -> str:
    """The keys in which two states differ."""
    keys = {*one.state, *other.state}
    return ", ".join(sorted(" ".join(key) for key in keys if one.state.get(key) != other.state.get(key)))


def _nftables(namespace: Namespace, state: dict[Key, object], exact: dict[Key, tuple[bytes, ...]]) -> None:
    rules: dict[Key, list[bytes]] = {}
    raw: dict[Key, list[bytes]] = {}
    for kind in (_TABLE, _CHAIN, _RULE, _SET):
        for body in _dump(namespace, NETLINK_NETFILTER, _NFT | kind, bytes(4)):
            family, attributes = str(body[0]), dict(_walk(body[4:]))
            kept = b"".join(_packed(k, v) for k, v in attributes.items() if k not in _AGES[kind])
            handle = attributes.get(_HANDLE[kind], b"")
            table = _text(attributes[1])
            if kind == _RULE:
                chain: Key = ("rules", family, table, _text(attributes[2]))
                rules.setdefault(chain, []).append(_uncounted(_without_set_index(kept)))
                raw.setdefault(chain, []).append(handle + kept)
                continue
            named = _NAME.get(kind)
            key: Key = (_WORDS[kind], family, table, *([_text(attributes[named])] if named else []))
            state[key] = kept
            exact[key] = (handle + kept,)
            if kind == _SET:
                ask = bytes([body[0], 0, 0, 0]) + _packed(1, attributes[1]) + _packed(2, attributes[2])
                elements = [
                    element
                    for answer in _dump(namespace, NETLINK_NETFILTER, _NFT | _ELEMENT, ask)
                    for _, element in _walk(dict(_walk(answer[4:])).get(3, b""))
                ]
                state[("elements", *key[1:])] = exact[("elements", *key[1:])] = tuple(sorted(elements))
    state.update({key: tuple(found) for key, found in rules.items()})
    exact.update({key: tuple(found) for key, found in raw.items()})


def _without_set_index(rule: bytes) -> bytes:
    """A rule without the index by which an xt match knows an ipset: the set that is made anew gets another."""
    at = rule.find(b"\x08\x00\x01\x00set\x00")
    if at < 0:
        return rule
    info = rule.find(b"\x03\x00", at + 8)
    return rule[: info + 2] + b"\0\0" + rule[info + 4 :] if info > 0 else rule


def _legacy(
    namespace: Namespace,
    family: str,
    level: int,
    table: str,
    state: dict[Key, object],
    exact: dict[Key, tuple[bytes, ...]],
) -> None:
    """The chains of a table. A rule is its counters and its bytes, a jump by the name of the chain that it leads to."""
    name = table.encode().ljust(32, b"\0")
    which: Family = "ip" if level == 0 else "ip6"
    info = namespace.getsockopt(which, 64, name + bytes(84 - 32))
    _, hooks, *places = struct.unpack("=32sI5I5III", info)
    size = places[-1]
    blob = namespace.getsockopt(which, 65, name + struct.pack("=II", size, 0) + bytes(size))[40:]
    offsets_at, counters_at = _PLACES[family]
    entries = list(_entries(blob, offsets_at))
    chains = {places[hook]: f"hook{hook}" for hook in range(5) if hooks & 1 << hook}
    for at, entry, target in entries:
        if target[2:31].rstrip(b"\0") == b"ERROR" and len(target) >= 62:
            label = target[32:62].split(b"\0")[0].decode()
            chains.setdefault(at + len(entry), label)
    current = ""
    found: dict[str, list[bytes]] = {}
    for at, entry, target in entries:
        current = chains.get(at, current)
        if target[2:31].rstrip(b"\0") == b"ERROR":
            continue
        found.setdefault(current, []).append(_resolved(entry, target, chains, offsets_at, counters_at))
    for chain, rules in found.items():
        key = ("legacy", family, table, chain)
        exact[key] = tuple(rules)
        if chain.startswith("hook") and len(rules) == 1:
            continue  # empty: the kernel cannot give up a table once it is there
        state[key] = tuple(rule[16:] for rule in rules)


def _entries(blob: bytes, offsets_at: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Each entry: where it is, all of it, and its target."""
    at = 0
    while at < len(blob):
        target, following = struct.unpack_from("=HH", blob, at + offsets_at)
        yield at, blob[at : at + following], blob[at + target : at + following]
        at += following


def _resolved(entry: bytes, target: bytes, chains: Mapping[int, str], offsets_at: int, counters_at: int) -> bytes:
    counters = entry[counters_at : counters_at + 16]
    fixed, matches = entry[:offsets_at], entry[counters_at + 16 : len(entry) - len(target)]
    if matches[2:6] == b"set\0":  # xt_set: the index of a set that is made anew is another
        matches = matches[:32] + b"\0\0" + matches[34:]
    if target[2:3] == b"\0" and len(target) == 40:
        (verdict,) = struct.unpack_from("=i", target, 32)
        if verdict >= 0:
            return counters + fixed + matches + b"jump " + chains.get(verdict, "next").encode()
    return counters + fixed + matches + target


def _ipsets(namespace: Namespace, state: dict[Key, object]) -> None:
    found: dict[Key, list[bytes]] = {}
    try:
        messages = list(_dump(namespace, NETLINK_NETFILTER, _IPSET | 7, bytes(4) + _packed(1, b"\x06")))
    except OSError:
        return  # a kernel without ipset
    for body in messages:
        attributes = dict(_walk(body[4:]))
        if 2 in attributes:
            elements = found.setdefault(("ipset", _text(attributes[2])), [])
            elements += [element for _, element in _walk(attributes.get(8, b""))]
    state.update({key: tuple(sorted(elements)) for key, elements in found.items()})


def _dump(namespace: Namespace, protocol: int, kind: int, body: bytes) -> Iterator[bytes]:
    """The bodies of all messages of an answer. Raises OSError."""
    request = _HEADER.pack(_HEADER.size + len(body), kind, _DUMP, 1, 0) + body
    for data in namespace.netlink(protocol, request):  # type: ignore[arg-type]  # one of its two literals
        at = 0
        while at + _HEADER.size <= len(data):
            length, said, _, _, _ = _HEADER.unpack_from(data, at)
            if said == 2:
                (number,) = struct.unpack_from("=i", data, at + _HEADER.size)
                if number:
                    raise OSError(-number, os.strerror(-number))
            elif said != 3:
                yield data[at + _HEADER.size : at + length]
            at += max((length + 3) & ~3, _HEADER.size)


def _walk(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def _packed(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode()
