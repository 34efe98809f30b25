"""Cases that random plans and mistaken backends asked for: what no other case noticed."""

from __future__ import annotations

from netapply.conformance.case import Case, Probe, Sender
from netapply.conformance.cases.words import (
    BY_GROUP,
    DIRECT,
    IN,
    OUT,
    PROXY,
    TPROXIED,
    address,
    captured,
    into,
    nets,
    out,
)
from netapply.ruleset import FAMILIES

_TPROXY = {"inbound": {"mode": "tproxy"}}
#: A proxy that calls the application from its client's address, as TPROXY is for.
_BORROWED = tuple(
    Probe("pod", "tcp", address("pod", family), 8080, DIRECT, PROXY, address("remote", family), mark=1337)
    for family in FAMILIES
)
_PLAIN = tuple(
    Probe("pod", protocol, address(to, family), port, DIRECT, sender)  # type: ignore[arg-type]  # tcp and udp
    for family in FAMILIES
    for sender in (Sender(1000, 1000), PROXY, Sender(0, 0))
    for protocol, to, port in (
        ("tcp", "remote", 80),
        ("tcp", "pod", 8080),
        ("tcp", "loopback", 80),
        ("udp", "remote", 53),
    )
)

CASES: tuple[Case, ...] = (
    Case("inbound tproxy: to an address that is not the pod's", "core", _TPROXY,
        (*into(TPROXIED, to="virtual"), *into(TPROXIED, to="virtual", device="br-1"))),
    Case("inbound tproxy: a mark under a mask, to an address that is not the pod's", "core",
        {"inbound": {"mode": "tproxy", "tproxy": {"mark": "0x539/0xfff", "table": 200}}},
        into(TPROXIED, to="virtual")),
    Case("inbound tproxy: what is left alone goes through", "core",
        {"inbound": {"mode": "tproxy", "ports": {"exclude": [8081]}}},
        (*into(DIRECT, 8081, to="virtual"), *into(DIRECT, 8081))),
    Case("inbound tproxy: the proxy borrows its client's address", "core", _TPROXY, _BORROWED, proxy=BY_GROUP),
    Case("inbound tproxy: before reroute", "full",
        {"inbound": {"mode": "tproxy", "tproxy": {"before_reroute": True}}, "interfaces": {"reroute": ["br-1"]}},
        (*into(TPROXIED, to="virtual", device="br-1"), *into(TPROXIED, device="eth1"))),
    Case("update: to tproxy, flows through the pod go on", "core", {"inbound": {"mode": "none"}},
        into(DIRECT, to="virtual"), story="update", update=_TPROXY, after=into(TPROXIED, to="virtual")),
    Case("inbound tproxy: what bears the mark under its mask stays here", "core",
        {"inbound": {"mode": "tproxy", "tproxy": {"mark": "0x539/0xfff"}}},
        (*out(captured(80, "tproxy"), "elsewhere", source="pod", sender=PROXY, mark=0x1539, only=("ip6",)),
        *out(captured(80, "tproxy"), "elsewhere", source="pod", sender=PROXY, mark=0x539, only=("ip6",)))),
    Case("update: to fewer destinations and ports", "core", {}, (*out(OUT, "elsewhere"), *into(IN)), story="update",
        update={"outbound": {"cidrs": {"include": nets("remote")}}, "inbound": {"ports": {"include": [8081]}}},
        after=(*out(DIRECT, "elsewhere"), *out(OUT), *into(DIRECT), *into(IN, 8081))),
    Case("counters: each rule counts what it matches", "core", {}, (*_PLAIN, *into(DIRECT), *into(DIRECT, 15008)),
        story="model"),
    Case("counters: by TPROXY, with DNS and zones", "core", {**_TPROXY, "dns": {"capture": "all"}, "invalid": "drop"},
        (*_PLAIN, *into(DIRECT), *into(DIRECT, 15008), *out(DIRECT, "pod", 53)), story="model"),
)  # fmt: skip
