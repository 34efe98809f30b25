"""Arbitrary plans from the whole schema, and arbitrary flows that are likely to meet what a plan speaks of. Pure.

Few values, so that plans and flows often speak of the same thing. The same seed gives the same plans and flows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, Literal, TypeVar

from netapply import plan as p
from netapply.backend import Dialect
from netapply.compiler import compile_plan
from netapply.conformance.case import DIRECT, Probe, Sender
from netapply.conformance.flows import packed
from netapply.conformance.world import POD, WIRES, is_local
from netapply.errors import PlanError, UnsupportedError
from netapply.importers.istio import Facts, plan_from_settings
from netapply.importers.istio_settings import IstioSettings
from netapply.lab.network import ADDRESSES
from netapply.planfile import dump_plan, load_plan
from netapply.ruleset import FAMILIES, Cidr, Family, PortRange
from netapply.spans import collapse, merge
from netapply.values import NamedTuple

T = TypeVar("T")

PORTS = (22, 53, 80, 443, 8080, 15001, 15006, 15008, 15020, 15053, 15090, 65535)
IDS = (0, 1000, 1337, 2000)
INTERFACES = ("eth0", "eth+", "lo", "br-1", "br+", "docker0")
LAYOUTS = ("netapply", "istio", "istio-1.11", "istio-1.4")
LOCAL: dict[Family, tuple[str, ...]] = {"ip": ("127.0.0.1", "127.0.0.6"), "ip6": ("::1",)}
PASSTHROUGH: dict[Family, str] = {"ip": "127.0.0.6", "ip6": "::6"}
#: Blocks are cut from these, and flows go to and come from them.
HOSTS: dict[Family, tuple[str, ...]] = {
    family: (*LOCAL[family], of.pod, of.remote, of.elsewhere, of.virtual) for family, of in ADDRESSES.items()
}
PREFIXES: dict[Family, tuple[int, ...]] = {"ip": (0, 1, 8, 16, 24, 31, 32), "ip6": (0, 1, 16, 64, 127, 128)}
MARKS = (p.Mark(1337), p.Mark(0x539, 0xFFF), p.Mark(0x100, 0x100), p.Mark(1))


class Arbitrary(NamedTuple):
    """A source of plans that the loader would accept."""

    random: Random

    # --- shapes ------------------------------------------------------------------------------------------------

    def one(self, values: Sequence[T]) -> T:
        """One of them."""
        return self.random.choice(values)

    def often(self, share: float) -> bool:
        """True so often."""
        return self.random.random() < share

    def some(self, make: Callable[[], T], most: int = 3) -> list[T]:
        """Up to `most` of what `make` makes, often none."""
        return [make() for _ in range(self.random.choice((0, *range(most + 1))))]

    # --- single values and lists -------------------------------------------------------------------------------

    def block(self) -> Cidr:
        family = self.one(FAMILIES)
        host, prefix = packed(self.one(HOSTS[family])), self.one(PREFIXES[family])
        rest = len(host) * 8 - prefix
        return Cidr((int.from_bytes(host) >> rest << rest).to_bytes(len(host)), prefix)

    def blocks(self) -> tuple[Cidr, ...]:
        return collapse(self.some(self.block, 4))

    def ports(self) -> tuple[PortRange, ...]:
        def make() -> PortRange:
            first = self.one(PORTS)
            return PortRange(*sorted((first, self.one(PORTS) if self.often(0.2) else first)))

        many = (
            [PortRange(n, n) for n in range(9000, 9000 + 2 * self.random.randint(8, 20), 2)] if self.often(0.1) else []
        )
        return merge((*self.some(make), *many))

    def ids(self) -> tuple[p.IdRange, ...]:
        return merge(
            p.IdRange(n, n + (500 if n and self.often(0.2) else 0)) for n in self.some(lambda: self.one(IDS), 2)
        )

    def owners(self) -> p.Owners:
        return p.Owners(self.ids(), self.ids())

    def or_all(self, make: Callable[[], T], share: float = 0.5) -> T | Literal["*"]:
        return "*" if self.often(share) else make()

    # --- groups ------------------------------------------------------------------------------------------------

    def proxy(self) -> p.Proxy:
        word: Any = self.one(("proxy", "everyone", "none", self.owners()))
        return p.Proxy(
            uids=self.one(((1337,), (1337,), (1337, 2000), ())),
            gids=self.one(((1337,), (2000,), ())),
            outbound_port=self.one((15001, 15001, 15101)),
            inbound_port=self.one((15006, 15006, 15106)),
            tunnel_port=self.one((None, 15008, 443)),
            tunnel_exempt=self.one((("inbound", "self-calls"), ("inbound",), ("self-calls",), ())),
            mark=self.one((None, None, *MARKS)),
            loopback=self.one((p.LOOPBACK, (Cidr(b"\x7f\0\0\0", 8), p.LOOPBACK[1]))),
            passthrough_sources=self.one(
                (p.PASSTHROUGH, p.PASSTHROUGH, p.PASSTHROUGH[:1], (), (Cidr(b"\x7f\0\0\0", 8),))
            ),
            probe_sources=self.blocks() if self.often(0.3) else (),
            self_calls=word,
        )

    def inbound(self) -> p.Inbound:
        return p.Inbound(
            mode=self.one(("redirect", "tproxy", "tproxy", "tproxy", "none")),
            ports=p.InboundPorts(self.or_all(self.ports), self.ports()),
            sources=p.Sources(self.blocks() if self.often(0.3) else ()),
            destinations=p.Destinations(self.blocks() if self.often(0.2) else ()),
            tproxy=p.TProxyRouting(
                self.one(MARKS), self.one((133, 200)), self.one((None, None, 15106)), self.often(0.3)
            ),
            placement=self.one(("first", "last")),
        )

    def outbound(self) -> p.Outbound:
        def exception() -> p.OwnerException:
            return p.OwnerException(self.one(("tcp", "udp")), self.or_all(self.ports), self.owners())

        return p.Outbound(
            cidrs=p.OutboundCidrs(self.or_all(self.blocks), self.blocks()),
            ports=p.OutboundPorts(self.ports(), self.ports()),
            owners=p.OwnerRules(self.or_all(self.owners, 0.7), self.owners()),
            exclude_for_owners=tuple(self.some(exception, 2)),
            loopback=self.one(("bypass", "bypass", "capture")),
            placement=self.one(("first", "last")),
        )

    def interfaces(self) -> p.Interfaces:
        def reroute() -> p.Reroute:
            include = self.or_all(self.blocks) if self.often(0.5) else None
            return p.Reroute(self.one(INTERFACES), include, self.blocks() if self.often(0.5) else None)

        if self.often(0.4):
            return p.Interfaces()
        excluded = dict.fromkeys(self.some(lambda: self.one(INTERFACES), 2))
        return p.Interfaces(tuple(excluded), tuple(self.some(reroute, 2)))

    def dns(self) -> p.Dns:
        answering = tuple(packed(ADDRESSES[family].remote) for family in FAMILIES)
        return p.Dns(
            capture=self.one(("none", "servers", "all")),
            servers=self.blocks(),
            port=self.one((15053, 15053, 15153)),
            addresses=self.one(((), (), (), answering, answering[:1], answering[1:])),
            zones=self.often(0.7),
            udp_exempt=self.one(("outbound", "outbound", "proxy")),
            self_calls=self.owners() if self.often(0.4) else p.Owners(),
        )

    # --- plans -------------------------------------------------------------------------------------------------

    def plan(self, layout: str = "netapply") -> p.CapturePlan:
        """A plan that the loader accepts and gives, of what `layout` can say."""
        while True:
            try:
                found = self._plan() if layout == "netapply" else self._istio(layout)
                plan = load_plan(json.dumps(dump_plan(found)), format="json")
                compile_plan(plan, Dialect("split", 15, 0), layout)
            except (PlanError, UnsupportedError):
                continue
            return plan

    def _plan(self) -> p.CapturePlan:
        """Each group is the default as often as not, or too little would ever be captured."""
        groups = {
            "proxy": self.proxy,
            "inbound": self.inbound,
            "outbound": self.outbound,
            "interfaces": self.interfaces,
            "dns": self.dns,
        }
        chosen = {name: make() for name, make in groups.items() if self.often(0.6)}
        own = {name: make() for name, make in groups.items() if self.often(0.4)} if self.often(0.15) else {}
        rest: dict[str, Any] = {
            "ipv6": self.one(("capture", "capture", "capture", "skip", "block")),
            "for_ipv6": p.Ipv6Groups(**own) if own else None,  # type: ignore[arg-type]  # each of its own group
            "invalid": self.one(("keep", "keep", "drop", "drop-all")),
            "log": p.LogSettings("netapply ", self.one((60, 600))) if self.often(0.2) else None,
            "comments": self.often(0.2),
        }
        return p.CapturePlan(**chosen, **rest)  # type: ignore[arg-type]  # likewise

    # --- flows -------------------------------------------------------------------------------------------------

    def probe(self) -> Probe:
        """A flow out of the pod, inside it, or into it. What is to become of it is left open."""
        family = self.one(FAMILIES)
        protocol: Literal["tcp", "udp"] = self.one(("tcp", "tcp", "udp"))
        wire = self.one((*WIRES[:1] * 3, *WIRES))
        of, port = ADDRESSES[family], self.one((*PORTS, 9000))
        sport = self.one((0, 0, 53, 15053)) if protocol == "udp" else 0  # of TCP a listener has the port
        if self.often(0.35):
            to = self.one((wire.pod(family), wire.pod(family), POD[family], of.virtual))
            source = self.one((wire.remote(family), of.elsewhere, of.virtual if to != of.virtual else of.elsewhere))
            state: Literal["new", "invalid"] = "invalid" if protocol == "tcp" and self.often(0.15) else "new"
            return Probe(
                "remote", protocol, to, port, DIRECT, source=source, sport=sport, device=wire.device, state=state
            )
        to = self.one((wire.remote(family), of.elsewhere, of.virtual, POD[family], wire.pod(family), *LOCAL[family]))
        source = self.one(("", POD[family], *LOCAL[family], PASSTHROUGH[family])) if is_local(to) else ""
        if sport == port:
            sport = 0  # to itself, where that is local
        who = Sender(self.one(IDS), self.one(IDS))
        mark = self.one((0,) * 8 + tuple(mark.value for mark in MARKS))
        return Probe("pod", protocol, to, port, DIRECT, who, source, sport, wire.device, mark)

    # --- settings of Istio -------------------------------------------------------------------------------------

    def _istio(self, layout: str) -> p.CapturePlan:
        """Of arbitrary settings of istio-iptables. Raises PlanError where Istio refuses them."""
        addresses = tuple(packed(ADDRESSES[family].pod) for family in FAMILIES)
        servers = self.one(((), (ADDRESSES["ip"].remote,), tuple(ADDRESSES[family].remote for family in FAMILIES)))
        facts = Facts(addresses, servers)
        return plan_from_settings(self._settings(), layout, facts)  # type: ignore[arg-type]  # one of the three

    def _settings(self) -> IstioSettings:
        def listed(values: Iterable[object], most: int = 3) -> str:
            pool = tuple(values)
            return ",".join(dict.fromkeys(str(self.one(pool)) for _ in range(self.random.randint(0, most))))

        ports, ids = PORTS[1:], IDS
        cidrs = ("10.77.0.0/24", "198.51.100.7/32", "203.0.113.0/24", "fd77::/64", "2001:db8::/32", "127.0.0.1/32")
        return IstioSettings(
            proxy_uid=self.one(("", "1337", "1337,2000", "0,1337")),
            proxy_gid=self.one(("", "1337", "2000")),
            istio_inbound_interception_mode=self.one(("REDIRECT", "TPROXY")),
            istio_inbound_tproxy_mark=self.one(("1337", "1")),
            istio_inbound_ports=self.one(("*", "*", listed(ports))),
            istio_local_exclude_ports=listed(ports),
            istio_service_cidr=self.one(("*", "*", listed(cidrs))),
            istio_service_exclude_cidr=listed(cidrs),
            istio_outbound_ports=listed(ports),
            istio_local_outbound_ports_exclude=listed(ports),
            istio_exclude_interfaces=self.one(("", "", "br-1", "eth1")),
            kube_virt_interfaces=self.one(("", "", "eth1", "br-1")),
            redirect_dns=self.often(0.5),
            capture_all_dns=self.often(0.3),
            drop_invalid=self.often(0.3),
            dual_stack=self.often(0.8),
            istio_outbound_owner_groups=self.one(("*", "*", "*", listed(ids, 2))),
            istio_outbound_owner_groups_exclude=self.one(("", "", listed(ids, 2))),
        )
