"""Rules over time: updates under open flows, rules of others, drift, failures.

Open flows of an update are known to conntrack; those that are older than the first plan are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from netapply.conformance.case import Case, Level
from netapply.conformance.cases.words import (
    DIRECT,
    DNS,
    DROPPED,
    IN,
    OUT,
    PROXY,
    TPROXIED,
    Sender,
    captured,
    hosts,
    into,
    out,
)

_TPROXY: dict[str, Any] = {"inbound": {"mode": "tproxy"}}
_DNS: dict[str, Any] = {"dns": {"capture": "all"}}
_LISTS: dict[str, Any] = {
    "outbound": {"cidrs": {"exclude": [f"11.0.{n}.0/24" for n in range(0, 80, 2)]}, "ports": {"exclude": [22]}},
    "inbound": {"ports": {"exclude": [15020, 15021, 15090]}},
}
_EVERYTHING: dict[str, Any] = {**_LISTS, **_DNS, "inbound": {"mode": "tproxy"}, "invalid": "drop", "comments": True}
_CAPTURED = (*out(OUT), *into(IN))

_UPDATES = (
    Case("update: captured flows stay captured when capture ends", "core", {}, _CAPTURED, story="update",
        update={"outbound": {"cidrs": {"include": []}}, "inbound": {"mode": "none"}},
        after=(*out(DIRECT), *into(DIRECT))),
    Case("update: direct flows stay direct when capture begins", "core",
        {"outbound": {"cidrs": {"exclude": hosts("remote")}}, "inbound": {"mode": "none"}},
        (*out(DIRECT), *into(DIRECT)), story="update", update={}, after=_CAPTURED),
    Case("update: flows of another port stay with it", "core", {}, _CAPTURED, story="update",
        update={"proxy": {"outbound_port": 16001, "inbound_port": 16006}},
        after=(*out(captured(16001)), *into(captured(16006)))),
    Case("update: from redirect to TPROXY", "core", {}, _CAPTURED, story="update", update=_TPROXY,
        after=(*out(OUT), *into(TPROXIED))),
    Case("update: from TPROXY to another mark", "full", _TPROXY, into(TPROXIED), story="update",
        update={"inbound": {"mode": "tproxy", "ports": {"exclude": [22]}}},
        after=(*into(TPROXIED), *into(DIRECT, 22))),
    Case("update: a long list comes", "full", {}, _CAPTURED, story="update", update=_LISTS,
        after=(*out(DIRECT, "11.0.2.9"), *out(OUT, "11.0.3.9"), *out(DIRECT, port=22))),
    Case("update: a long list goes", "full", _LISTS, (*out(DIRECT, "11.0.2.9"), *out(OUT)), story="update",
        update={}, after=out(OUT, "11.0.2.9")),
    Case("update: DNS begins, with open TCP flows", "full", {}, _CAPTURED, story="update", update=_DNS,
        after=(*out(DNS, port=53, protocol="udp"), *out(OUT))),
    Case("update: an excluded owner", "full", {}, out(OUT, sender=Sender(2000, 1)), story="update",
        update={"outbound": {"owners": {"exclude": {"uids": [2000]}}}}, after=out(DIRECT, sender=Sender(2000, 1))),
    Case("update: from everything to nothing special", "full", _EVERYTHING, into(TPROXIED), story="update",
        update={"invalid": "keep", "outbound": {"loopback": "capture"}}, after=_CAPTURED),
    Case("update: self-calls end", "full", {}, out(IN, "pod", 8080, sender=PROXY), story="update",
        update={"proxy": {"self_calls": "none"}}, after=out(DIRECT, "pod", 8080, sender=PROXY)),
)  # fmt: skip

#: Applications and the proxy call and are called, over `lo` too, before anybody captures anything.
_OLDER = (*out(DIRECT), *into(DIRECT), *out(DIRECT, "pod", 8080, sender=PROXY), *out(DIRECT, "loopback", 8081))
_BLOCK: dict[str, Any] = {"ipv6": "block"}
_BLOCKED = (
    *out(OUT, only=("ip",)), *into(IN, only=("ip",)), *out(DROPPED, only=("ip6",)), *into(DROPPED, only=("ip6",)),
)  # fmt: skip

_OLDEST = (
    Case("older connections: redirect", "core", {}, _OLDER, story="older", after=_CAPTURED),
    Case("older connections: TPROXY", "core", _TPROXY, _OLDER, story="older", after=(*out(OUT), *into(TPROXIED))),
    Case("older connections: IPv6 is blocked", "core", _BLOCK, _OLDER, story="older", after=_BLOCKED),
    Case("older connections: loopback is captured", "full", {"outbound": {"loopback": "capture"}}, _OLDER,
        story="older", after=_CAPTURED),
    Case("older connections: DNS and lists", "full", {**_LISTS, **_DNS}, (*_OLDER, *out(DIRECT, port=53)),
        story="older", after=(*out(OUT), *out(DNS, port=53))),
    Case("older connections: everything", "full", _EVERYTHING, _OLDER, story="older", after=into(TPROXIED)),
    Case("older connections: everything is blocked", "full", {**_EVERYTHING, **_BLOCK}, _OLDER, story="older",
        after=into(TPROXIED, only=("ip",))),
    Case("older connections: listed owners", "full", {"outbound": {"owners": {"include": {"uids": [1000]}}}}, _OLDER,
        story="older", after=out(OUT)),
    Case("older connections: an update from redirect to TPROXY", "full", {}, _OLDER, story="older", update=_TPROXY,
        after=(*out(OUT), *into(TPROXIED))),
    Case("older connections: an update that blocks IPv6", "full", {}, _OLDER, story="older", update=_BLOCK,
        after=_BLOCKED),
    Case("older connections: an update that skips IPv6", "full", {}, _OLDER, story="older", update={"ipv6": "skip"},
        after=(*out(OUT, only=("ip",)), *out(DIRECT, only=("ip6",)))),
)  # fmt: skip

#: Somebody who captures one port, in and out, for a proxy of his own.
_OTHER: dict[str, Any] = {
    "proxy": {
        "outbound_port": 15501,
        "inbound_port": 15506,
        "tunnel_port": None,
        "self_calls": "none",
        "passthrough_sources": [],
    },
    "outbound": {"cidrs": {"include": []}, "ports": {"include": [9090]}},
    "inbound": {"ports": {"include": [9090]}},
}
_LAST: dict[str, Any] = {"outbound": {"placement": "last"}, "inbound": {"placement": "last"}}

_FOREIGN = (
    Case("foreign: ours come first", "core", {}, (*out(OUT, port=9090), *into(IN, 9090), *out(OUT)), story="foreign",
        update=_OTHER, after=(*out(captured(15501), port=9090), *into(captured(15506), 9090))),
    Case("foreign: ours come last", "core", _LAST,
        (*out(captured(15501), port=9090), *into(captured(15506), 9090), *out(OUT), *into(IN)), story="foreign",
        update=_OTHER, after=out(captured(15501), port=9090)),
    Case("foreign: inbound first, outbound last", "full", {"outbound": {"placement": "last"}},
        (*out(captured(15501), port=9090), *into(IN, 9090)), story="foreign", update=_OTHER),
    Case("foreign: outbound first, inbound last", "full", {"inbound": {"placement": "last"}},
        (*out(OUT, port=9090), *into(captured(15506), 9090)), story="foreign", update=_OTHER),
    Case("foreign: everything beside them", "core", _EVERYTHING,
        (*out(OUT), *into(TPROXIED), *out(DNS, port=53, protocol="udp")), story="foreign", update=_OTHER,
        after=out(captured(15501), port=9090)),
    Case("foreign: long lists beside theirs", "full", _LISTS, out(OUT), story="foreign",
        update={**_OTHER, "outbound": {"cidrs": {"include": [f"12.0.{n}.0/24" for n in range(0, 80, 2)]}}},
        after=(*out(captured(15501), "12.0.2.9"), *out(DIRECT, "12.0.3.9"))),
)  # fmt: skip

_PLANS: dict[str, dict[str, Any]] = {
    "redirect": {},
    "tproxy": _TPROXY,
    "dns": _DNS,
    "lists": _LISTS,
    "everything": _EVERYTHING,
}


def _drift() -> Iterator[Case]:
    for name, plan in _PLANS.items():
        level: Level = "core" if name in ("redirect", "everything") else "full"
        yield Case(f"drift: {name}", level, plan, out(OUT), story="drift")


def _failures() -> Iterator[Case]:
    for name, plan in _PLANS.items():
        before: dict[str, Any] = _TPROXY if name == "redirect" else {}
        level: Level = "core" if name == "everything" else "full"
        yield Case(f"failure: on the way to {name}", level, before, out(OUT), story="failure", update=plan)


CASES: tuple[Case, ...] = (*_UPDATES, *_OLDEST, *_FOREIGN, *_drift(), *_failures())
