"""Lists and ranges, by their edges: first and last of each, and their neighbours. Generated, with stable names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

from netapply.conformance.case import Case, Level, Probe, Sender, Verdict
from netapply.conformance.cases.words import DIRECT, IN, OUT, TPROXIED, block, ends, into, out, shown
from netapply.conformance.flows import packed

_FOUR, _SIX = "101.102.103.104", "2a02:1234:5678:9abc:def0:1357:2468:ace0"
_PREFIXES = [
    *((_FOUR, n) for n in (1, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32)),
    *((_SIX, n) for n in (3, 16, 32, 33, 48, 63, 64, 65, 96, 127, 128)),
]
_CORE_PREFIXES = {(_FOUR, 16), (_FOUR, 25), (_FOUR, 32), (_SIX, 48), (_SIX, 65), (_SIX, 128)}

#: Port lists, as plans write them.
_PORTS: dict[str, list[Any]] = {
    "one": [8080],
    "the first of all": [1],
    "the last of all": [65535],
    "a range": ["8000-8100"],
    "a range from the first": ["1-1023"],
    "a range to the last": ["60000-65535"],
    "two": [80, 443],
    "a port and a range": [443, "8000-8100"],
    "15 ports": [*range(1001, 1031, 2)],
    "16 ports": [*range(1001, 1033, 2)],
    "40 ports": [*range(1001, 1081, 2)],
    "7 ranges and a port": [*(f"{n}-{n + 3}" for n in range(1000, 1070, 10)), 2000],
    "8 ranges": [f"{n}-{n + 3}" for n in range(1000, 1080, 10)],
    "30 ranges": [f"{n}-{n + 3}" for n in range(1000, 1300, 10)],
}
_CORE_PORTS = {"one", "a range", "15 ports", "16 ports", "8 ranges"}
#: Id lists: what a plan writes, then who is in it, and who is not.
_IDS: dict[str, tuple[list[Any], list[int], list[int]]] = {
    "one": ([2000], [2000], [1999, 2001]),
    "a range": (["2000-2999"], [2000, 2500, 2999], [1999, 3000]),
    "two ranges": (["2000-2009", "3000-3009"], [2000, 2009, 3000, 3009], [1999, 2010, 2999, 3010]),
    "twenty": ([*range(2000, 2040, 2)], [2000, 2020, 2038], [1999, 2001, 2039, 2040]),
    "above 65535": (["70000-80000"], [70000, 80000], [69999, 80001, 4464]),
    "to the highest": (["4294967290-4294967294"], [4294967290, 4294967294], [4294967289]),
}


def _level(core: bool) -> Level:  # noqa: FBT001 - one of two words
    return "core" if core else "full"


# --- blocks ------------------------------------------------------------------------------------------------------


def _edges(address: str, prefix: int) -> tuple[list[str], list[str]]:
    """Addresses in the block, and beside it; none that no host can have."""
    first, last = ends(address, prefix)
    inside = [first, last] if prefix >= 8 else [int.from_bytes(packed(address)), last >> 1 | first]
    beside = [first - 1, last + 1] if prefix >= 8 else []
    return [shown(n, address) for n in dict.fromkeys(inside)], [shown(n, address) for n in beside]


def _blocks() -> Iterator[Case]:
    for address, prefix in _PREFIXES:
        text = block(address, prefix)
        inside, beside = _edges(address, prefix)
        level = _level((address, prefix) in _CORE_PREFIXES)
        for word, within, without in (("exclude", DIRECT, OUT), ("include", OUT, DIRECT)):
            probes = _to(within, inside) + _to(without, beside)
            yield Case(
                f"outbound.cidrs.{word}: the edges of {text}", level, {"outbound": {"cidrs": {word: [text]}}}, probes
            )
        if prefix >= 8:
            plan = {"inbound": {"sources": {"exclude": [text]}}}
            yield Case(
                f"inbound.sources.exclude: the edges of {text}", "full", plan, _from(DIRECT, inside) + _from(IN, beside)
            )


def _to(expect: Verdict, addresses: Sequence[str]) -> tuple[Probe, ...]:
    return tuple(probe for address in addresses for probe in out(expect, address))


def _from(expect: Verdict, addresses: Sequence[str]) -> tuple[Probe, ...]:
    return tuple(
        probe
        for address in addresses
        for probe in into(expect, source=address, only=("ip6",) if ":" in address else ("ip",))
    )


def _many(count: int) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """So many blocks of each family with gaps between them; some addresses in them, and some in gaps."""
    numbers = range(0, 2 * count, 2)
    listed = [f"11.{n >> 8}.{n & 255}.0/24" for n in numbers] + [f"2a02:{n:x}::/32" for n in numbers]
    some = sorted({0, count // 2 * 2, 2 * count - 2})
    inside = [f"11.{n >> 8}.{n & 255}.9" for n in some] + [f"2a02:{n:x}::9" for n in some]
    gaps = [f"11.{n + 1 >> 8}.{n + 1 & 255}.9" for n in some] + [f"2a02:{n + 1:x}::9" for n in some]
    return listed, tuple(inside), tuple(gaps)


def _long_lists() -> Iterator[Case]:
    for count in (2, 3, 5, 16, 60, 300, 2000):
        listed, inside, gaps = _many(count)
        level: Level = "core" if count in (3, 60) else "full" if count < 2000 else "stress"
        for word, within, without in (("exclude", DIRECT, OUT), ("include", OUT, DIRECT)):
            probes = _to(within, inside) + _to(without, gaps)
            plan: dict[str, Any] = {"outbound": {"cidrs": {word: listed}}}
            yield Case(f"outbound.cidrs.{word}: {count} blocks of each family", level, plan, probes)
        for mode, taken in (("redirect", IN), ("tproxy", TPROXIED)):
            plan = {"inbound": {"mode": mode, "sources": {"exclude": listed}}}
            probes = _from(DIRECT, inside) + _from(taken, gaps)
            yield Case(f"inbound.sources.exclude: {count} blocks of each family, {mode}", level, plan, probes)
    listed, inside, gaps = _many(60)
    plan = {"outbound": {"cidrs": {"include": listed, "exclude": [f"{address}" for address in inside]}}}
    neighbours = [
        address.replace(".9", ".8") if "." in address else address.replace("::9", "::8") for address in inside
    ]
    probes = _to(DIRECT, (*inside, *gaps)) + _to(OUT, neighbours)
    yield Case("outbound.cidrs: 60 blocks with an address excluded in some", "full", plan, probes)
    plan = {"interfaces": {"reroute": [{"interface": "docker0", "include": listed}]}}
    probes = tuple(p for a in inside for p in into(OUT, 80, to=a, device="docker0"))
    yield Case("interfaces.reroute: 60 blocks of each family", "full", plan, probes)


# --- ports -------------------------------------------------------------------------------------------------------


def _port_edges(listed: list[Any]) -> tuple[list[int], list[int]]:
    """Ports in the list, and beside it: the ends of the first, the middle and the last entry."""
    spans = [tuple(map(int, str(entry).split("-"))) for entry in listed]
    some = [spans[at] for at in sorted({0, len(spans) // 2, len(spans) - 1})]
    inside = {port for span in some for port in span}
    beside = {port for span in some for port in (span[0] - 1, span[-1] + 1)}
    covered = {port for span in spans for port in range(span[0], span[-1] + 1)}
    return sorted(inside), sorted(port for port in beside - covered if 0 < port <= 65535)


_Planned: TypeAlias = Callable[[list[Any]], dict[str, Any]]
_Probed: TypeAlias = Callable[[int], tuple[Probe, ...]]
#: A field with ports: the plan with these, and probes to a port that is in it and to one that is not.
_PORT_FIELDS: dict[str, tuple[_Planned, _Probed, _Probed]] = {
    "inbound.ports.include": (
        lambda p: {"inbound": {"ports": {"include": p}}},
        lambda n: into(IN, n),
        lambda n: into(DIRECT, n),
    ),
    "inbound.ports.exclude": (
        lambda p: {"inbound": {"ports": {"exclude": p}}},
        lambda n: into(DIRECT, n),
        lambda n: into(IN, n),
    ),
    "inbound.ports.include, tproxy": (
        lambda p: {"inbound": {"mode": "tproxy", "ports": {"include": p}}},
        lambda n: into(TPROXIED, n),
        lambda n: into(DIRECT, n),
    ),
    "inbound.ports.exclude, tproxy": (
        lambda p: {"inbound": {"mode": "tproxy", "ports": {"exclude": p}}},
        lambda n: into(DIRECT, n),
        lambda n: into(TPROXIED, n),
    ),
    "outbound.ports.exclude": (
        lambda p: {"outbound": {"ports": {"exclude": p}}},
        lambda n: out(DIRECT, port=n),
        lambda n: out(OUT, port=n),
    ),
    "outbound.ports.include": (
        lambda p: {"outbound": {"cidrs": {"include": []}, "ports": {"include": p}}},
        lambda n: out(OUT, port=n),
        lambda n: out(DIRECT, port=n),
    ),
    "outbound.exclude_for_owners.ports": (
        lambda p: {"outbound": {"exclude_for_owners": [{"protocol": "tcp", "ports": p, "uids": [2000]}]}},
        lambda n: out(DIRECT, port=n, sender=Sender(2000, 1)) + out(OUT, port=n),
        lambda n: out(OUT, port=n, sender=Sender(2000, 1)),
    ),
}
#: Ports that mean something else by default.
_SPECIAL = {15008}


def _port_lists() -> Iterator[Case]:
    for field, (plan, within, without) in _PORT_FIELDS.items():
        for name, listed in _PORTS.items():
            inside, beside = _port_edges(listed)
            probes = tuple(p for n in inside for p in within(n)) + tuple(
                p for n in beside if n not in _SPECIAL for p in without(n)
            )
            yield Case(f"{field}: {name}", _level(name in _CORE_PORTS and "owners" not in field), plan(listed), probes)


# --- ids ---------------------------------------------------------------------------------------------------------

#: A field with owners: the plan with these, and what becomes of who is in it and of who is not.
_OWNER_FIELDS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], Verdict, Verdict, str]] = {
    "outbound.owners.include": (lambda o: {"outbound": {"owners": {"include": o}}}, OUT, DIRECT, "remote"),
    "outbound.owners.exclude": (lambda o: {"outbound": {"owners": {"exclude": o}}}, DIRECT, OUT, "remote"),
    "outbound.exclude_for_owners": (
        lambda o: {"outbound": {"exclude_for_owners": [{"protocol": "tcp", "ports": "*", **o}]}},
        DIRECT,
        OUT,
        "remote",
    ),
    "proxy.self_calls": (lambda o: {"proxy": {"self_calls": o}}, IN, DIRECT, "pod"),
}


def _id_lists() -> Iterator[Case]:
    kinds: tuple[Literal["uids", "gids"], ...] = ("uids", "gids")
    for field, (plan, within, without, to) in _OWNER_FIELDS.items():
        for kind in kinds:
            for name, (listed, inside, beside) in _IDS.items():
                probes = tuple(p for n in inside for p in out(within, to, sender=_sender(kind, n)))
                probes += tuple(p for n in beside for p in out(without, to, sender=_sender(kind, n)))
                core = field == "outbound.owners.exclude" and name in ("a range", "above 65535")
                yield Case(f"{field}: {kind}, {name}", _level(core), plan({kind: listed}), probes)


def _sender(kind: Literal["uids", "gids"], number: int) -> Sender:
    return Sender(number, 1) if kind == "uids" else Sender(1, number)


CASES: tuple[Case, ...] = (*_blocks(), *_long_lists(), *_port_lists(), *_id_lists())
