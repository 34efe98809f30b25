"""DNS: which queries go to the proxy, over UDP and TCP, whose do not, and that no flow is left without a reply."""

from __future__ import annotations

from netapply.conformance.case import Case, Probe
from netapply.conformance.cases.words import (
    DIRECT,
    DNS,
    IN,
    OUT,
    PROXY,
    Sender,
    captured,
    hosts,
    into,
    out,
)
from netapply.conformance.cgroups import NAME as CGROUP

_ALL = {"dns": {"capture": "all"}}
_LISTED = {"dns": {"capture": "servers", "servers": hosts("elsewhere")}}
_LOCAL, _FAR = hosts("loopback"), hosts("virtual")


def _both(expect: object, to: str = "remote", **more: object) -> tuple[Probe, ...]:
    """A query over UDP, and one over TCP."""
    return (*out(expect, to, 53, "udp", **more), *out(expect, to, 53, **more))  # type: ignore[arg-type]


def _dnat(address: str, port: int, family: str) -> tuple[Probe, ...]:
    return _both(captured(port, "dnat", address), only=(family,))


CASES: tuple[Case, ...] = (
    Case("dns none: queries over UDP are left alone, over TCP captured as TCP", "core", {},
        (*out(DIRECT, port=53, protocol="udp"), *out(OUT, port=53))),
    Case("dns all: queries to anybody", "core", _ALL, (*_both(DNS), *_both(DNS, "elsewhere")), all_replied=True),
    Case("dns all: the proxy's own go out", "core", _ALL, (*_both(DIRECT, sender=PROXY), *_both(DNS)),
        all_replied=True),
    Case("dns all: the proxy's own, by gid", "full", _ALL, _both(DIRECT, sender=Sender(1, 1337)), all_replied=True),
    Case("dns all: the proxy's own, by mark", "full", {**_ALL, "proxy": {"mark": "0x40"}},
        (*_both(DIRECT, mark=0x40), *_both(DNS, mark=0x41)), all_replied=True),
    Case("dns all: other ports are no queries", "core", _ALL, (*out(DIRECT, port=54, protocol="udp"),
        *out(OUT, port=54), *out(DIRECT, port=52, protocol="udp"))),
    Case("dns all: over lo", "core", _ALL, _both(DNS, "loopback"), all_replied=True),
    Case("dns all: to the pod's own address", "full", _ALL, _both(DNS, "pod"), all_replied=True),
    Case("dns all: another port answers", "full", {"dns": {"capture": "all", "port": 5300}}, _both(captured(5300))),
    Case("dns all: without zones", "full", {"dns": {"capture": "all", "zones": False}},
        (*_both(DNS), *_both(DIRECT, sender=PROXY))),
    Case("dns servers: those that are listed", "core", _LISTED,
        (*_both(DNS, "elsewhere"), *_both(DIRECT, "elsewhere", sender=PROXY)), all_replied=True),
    Case("dns servers: queries to others go out over UDP, and are TCP over TCP", "core", _LISTED,
        (*out(DIRECT, "nearby", 53, "udp"), *out(OUT, "nearby", 53)), all_replied=True),
    Case("dns servers: a block of them", "full",
        {"dns": {"capture": "servers", "servers": ["198.51.100.0/24", "2001:db8:7::/48"]}},
        (*_both(DNS, "elsewhere"), *_both(DNS, "198.51.100.255"), *out(DIRECT, "nearby", 53, "udp")),
        all_replied=True),
    Case("dns servers: several", "full",
        {"dns": {"capture": "servers", "servers": hosts("elsewhere", "virtual", "remote")}},
        (*_both(DNS, "elsewhere"), *_both(DNS, "virtual"), *_both(DNS)), all_replied=True),
    Case("dns servers: without zones", "full",
        {"dns": {"capture": "servers", "servers": hosts("elsewhere"), "zones": False}},
        (*_both(DNS, "elsewhere"), *_both(DIRECT, "elsewhere", sender=PROXY))),
    Case("dns servers: one on lo", "full", {"dns": {"capture": "servers", "servers": _LOCAL}},
        (*_both(DNS, "loopback"), *out(DIRECT, port=53, protocol="udp")), all_replied=True),
    Case("dns addresses: on lo", "core", {"dns": {"capture": "all", "addresses": _LOCAL}},
        (*_dnat("127.0.0.1", 15053, "ip"), *_dnat("::1", 15053, "ip6")), all_replied=True),
    Case("dns addresses: far away", "full", {"dns": {"capture": "all", "addresses": _FAR, "port": 5353}},
        (*_dnat("203.0.113.10", 5353, "ip"), *_dnat("2001:db8:10::10", 5353, "ip6")), all_replied=True),
    Case("dns addresses: of IPv4 alone", "full", {"dns": {"capture": "all", "addresses": ["127.0.0.1"]}},
        (*_dnat("127.0.0.1", 15053, "ip"), *out(DIRECT, port=53, protocol="udp", only=("ip6",)),
        *out(OUT, port=53, only=("ip6",)))),
    Case("dns addresses: for listed servers", "full",
        {"dns": {"capture": "servers", "servers": hosts("remote"), "addresses": _LOCAL}},
        (*_dnat("127.0.0.1", 15053, "ip"), *_dnat("::1", 15053, "ip6"), *out(DIRECT, "nearby", 53, "udp"))),
    Case("dns addresses: the proxy's own go out", "full", {"dns": {"capture": "all", "addresses": _LOCAL}},
        _both(DIRECT, sender=PROXY)),
    Case("dns exempt: an excluded owner", "core", {**_ALL, "outbound": {"owners": {"exclude": {"uids": [2000]}}}},
        (*_both(DIRECT, sender=Sender(2000, 1)), *_both(DNS)), all_replied=True),
    Case("dns exempt: who is not included", "full", {**_ALL, "outbound": {"owners": {"include": {"gids": [2000]}}}},
        (*_both(DNS, sender=Sender(1, 2000)), *_both(DIRECT)), all_replied=True),
    Case("dns exempt: an excluded port 53", "full", {**_ALL, "outbound": {"ports": {"exclude": [53]}}},
        _both(DIRECT), all_replied=True),
    Case("dns exempt: owners over UDP", "core", {**_ALL,
        "outbound": {"exclude_for_owners": [{"protocol": "udp", "ports": [53], "uids": [2000]}]}},
        (*out(DIRECT, port=53, protocol="udp", sender=Sender(2000, 1)), *out(DNS, port=53, sender=Sender(2000, 1)),
        *_both(DNS)), all_replied=True),
    Case("dns exempt: owners over TCP", "full", {**_ALL,
        "outbound": {"exclude_for_owners": [{"protocol": "tcp", "ports": "*", "uids": [2000]}]}},
        (*out(DNS, port=53, protocol="udp", sender=Sender(2000, 1)), *out(DIRECT, port=53, sender=Sender(2000, 1)))),
    Case("dns exempt: a cgroup", "full",
        {**_ALL, "outbound": {"owners": {"exclude": {"cgroups": [f"{CGROUP}/app"]}}}},
        (*_both(DIRECT, sender=Sender(cgroup="app")), *_both(DNS))),
    Case("dns exempt: an excluded device", "full", {**_ALL, "interfaces": {"exclude": ["eth1"]}},
        (*_both(DIRECT, "elsewhere", device="eth1"), *_both(DNS, "elsewhere")), all_replied=True),
    Case("dns exempt: probe sources", "full", {**_ALL, "proxy": {"probe_sources": hosts("elsewhere")}},
        (*_both(DIRECT, "elsewhere"), *_both(DNS))),
    Case("dns exempt: an excluded block does not exempt queries", "full",
        {**_ALL, "outbound": {"cidrs": {"exclude": hosts("elsewhere")}}},
        (*_both(DNS, "elsewhere"), *out(DIRECT, "elsewhere"))),
    Case("dns udp_exempt proxy: an excluded owner's queries over UDP are captured", "full",
        {"dns": {"capture": "all", "udp_exempt": "proxy"}, "outbound": {"owners": {"exclude": {"uids": [2000]}}}},
        (*out(DNS, port=53, protocol="udp", sender=Sender(2000, 1)), *out(DIRECT, port=53, sender=Sender(2000, 1)),
        *_both(DIRECT, sender=PROXY)), all_replied=True),
    Case("dns udp_exempt proxy: an excluded port does not exempt UDP", "full",
        {"dns": {"capture": "all", "udp_exempt": "proxy"}, "outbound": {"ports": {"exclude": [53]}}},
        (*out(DNS, port=53, protocol="udp"), *out(DIRECT, port=53))),
    Case("dns self_calls: of some owners", "full", {"dns": {"capture": "all", "self_calls": {"uids": [2000]}}},
        (*out(IN, "pod", 53, sender=Sender(2000, 1)), *out(DNS, "pod", 53),
        *out(DNS, "pod", 53, "udp", sender=Sender(2000, 1)))),
    Case("dns: with TPROXY", "core", {**_ALL, "inbound": {"mode": "tproxy"}},
        (*_both(DNS), *_both(DIRECT, sender=PROXY)), all_replied=True),
    Case("dns: TPROXY and listed servers", "full", {**_LISTED, "inbound": {"mode": "tproxy"}},
        (*_both(DNS, "elsewhere"), *out(DIRECT, "nearby", 53, "udp")), all_replied=True),
    Case("dns: queries that come in are left alone", "core", _ALL, (*into(DIRECT, 53, "udp"), *into(IN, 53)),
        all_replied=True),
    Case("dns: a rerouted device's queries over UDP are left alone", "full",
        {**_ALL, "interfaces": {"reroute": ["docker0"]}},
        (*into(DIRECT, 53, "udp", to="elsewhere", device="docker0"),
        *into(OUT, 53, to="elsewhere", device="docker0"))),
    Case("dns: the proxy asks from the port from which a client asked", "core", _LISTED,
        out(DNS, "elsewhere", 53, "udp", sport=41000),
        after=out(DIRECT, "elsewhere", 53, "udp", sender=PROXY, sport=41000), all_replied=True),
    Case("dns: a client asks from the port from which the proxy asked", "full", _LISTED,
        out(DIRECT, "elsewhere", 53, "udp", sender=PROXY, sport=41001),
        after=out(DNS, "elsewhere", 53, "udp", sport=41001), all_replied=True),
)  # fmt: skip
