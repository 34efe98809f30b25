"""From the settings of istio-iptables to a capture plan that decides as the named version of Istio does. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from netapply import plan as p
from netapply.errors import Fault, PlanError
from netapply.importers.istio_settings import PORT, IstioSettings, spelled
from netapply.ruleset import Cidr, PortRange
from netapply.sockets import socket
from netapply.values import NamedTuple

Version: TypeAlias = Literal["istio", "istio-1.11", "istio-1.4"]

VERSIONS: tuple[Version, ...] = ("istio", "istio-1.11", "istio-1.4")
#: As ValidateOwnerGroups.
MAX_GROUPS = 64
SSH = PortRange(22, 22)
LOOPBACK_6, ALL_4 = p.LOOPBACK[1], Cidr(bytes(4), 0)


class Facts(NamedTuple):
    """What Istio looks up: the namespace's addresses (packed, in the kernel's order), resolvers, users and groups.

    Of `users` and `groups` only the names that stand in the settings are asked for.
    """

    addresses: tuple[bytes, ...] = ()
    servers: tuple[str, ...] = ()
    users: Mapping[str, int] = {}
    groups: Mapping[str, int] = {}


def plan_from_settings(settings: IstioSettings, version: Version, facts: Facts) -> p.CapturePlan:
    """The plan; lists keep their order, as rules do in Istio. Raises PlanError with all that Istio refuses."""
    made = _Reading(settings, version, facts)
    plan = made.plan()
    if made.faults:
        raise PlanError(tuple(made.faults))
    return plan


class _Reading:
    """One reading of settings. Faults are collected."""

    def __init__(self, settings: IstioSettings, version: Version, facts: Facts) -> None:
        self.given, self.version, self.facts = settings, version, facts
        self.faults: list[Fault] = []
        self.tproxy = self._mode() == "tproxy"
        self.oldest = version == "istio-1.4"

    def plan(self) -> p.CapturePlan:
        given = self.given
        uid = given.proxy_uid or str(self.facts.users.get(given.envoy_user, 1337)) + ",0" * self.oldest
        uids = self._numbers("proxy_uid", uid)
        gids = self._numbers("proxy_gid", given.proxy_gid or uid)
        include = self._cidrs("istio_service_cidr")
        exclude = self._cidrs("istio_service_exclude_cidr")
        if isinstance(exclude, str):
            self._refuse("istio_service_exclude_cidr", "*", "write a list of blocks")
            exclude = ()
        local = self._loopback()
        dns = self._dns(gids)
        everything = given.istio_inbound_ports == "*"
        inner = self._port("inbound_capture_port")
        outer = self._port("envoy_port")
        proxy = p.Proxy(
            uids, gids, 0 in (*uids, *gids), outer, outer if self.oldest and not everything else inner,
            None if self.oldest else self._port("inbound_tunnel_port"), self._tunnel(), None, (local, LOOPBACK_6),
        )  # fmt: skip
        captures_lo = not self.oldest and self._names_loopback(include)
        # Of nat's rules those of the first uid return everybody else's; TPROXY takes what any of the proxy's ids sends.
        by_any = captures_lo or (self.tproxy and bool(given.istio_inbound_ports))
        first = p.Owners(uids=_ids(uids[:1]))
        callers: Literal["proxy", "everyone"] | p.Owners = "everyone" if self.oldest else "proxy" if by_any else first
        plan = p.CapturePlan(
            proxy._replace(self_calls=callers),
            self._inbound(proxy, outer),
            p.Outbound(
                p.OutboundCidrs(include, exclude),
                p.OutboundPorts(self._ports("istio_outbound_ports"), self._ports("istio_local_outbound_ports_exclude")),
                self._owners(),
                loopback="capture" if captures_lo else "bypass",
                placement="last",
            ),
            self._interfaces(),
            dns,
            ipv6="capture" if self._ipv6() and not self.oldest else "skip",
            invalid=("drop" if self.tproxy else "drop-all") if given.drop_invalid else "keep",
        )
        if self.version == "istio-1.11" and plan.ipv6 == "capture":
            plan = plan._replace(for_ipv6=_ipv6_of_1_11(plan, first))
        return plan

    def _refuse(self, name: str, value: str, accepted: str) -> None:
        self.faults.append(Fault(spelled(name), value or "nothing", accepted))

    def _text(self, name: str) -> str:
        return str(getattr(self.given, name))

    def _list(self, name: str) -> list[str]:
        return [word.strip() for word in self._text(name).split(",") if word.strip()]

    def _mode(self) -> Literal["redirect", "tproxy"]:
        mode = self.given.istio_inbound_interception_mode
        return "tproxy" if mode == "TPROXY" else "redirect"  # Istio takes any other word for REDIRECT

    def _port(self, name: str) -> int:
        text = self._text(name).strip()
        if 0 < (port := _decimal(text)) < 1 << 16:
            return port
        self._refuse(name, text, PORT)
        return 1

    def _ports(self, name: str) -> tuple[PortRange, ...]:
        """Ports and ranges as iptables writes them, `8000:8100`; either end may be left out."""
        found: list[PortRange] = []
        for word in self._list(name):
            first, colon, last = word.partition(":")
            low = _decimal(first) if first or not colon else 0
            high = low if not colon else _decimal(last) if last else 65535
            if 0 <= low <= high < 1 << 16:
                found.append(PortRange(low, high))
            else:
                self._refuse(name, word, "write a port of 0 to 65535, or a range as 8000:8100")
        return tuple(found)

    def _numbers(self, name: str, text: str) -> tuple[int, ...]:
        """Uids or gids of the proxy."""
        return tuple(first for first, _ in self._ids(name, text, "write an id, or a name that exists here"))

    def _ids(self, name: str, text: str, accepted: str, *, ranges: bool = False) -> tuple[p.IdRange, ...]:
        """As iptables does: names are looked up, a range is written `1000-2000`."""
        names = self.facts.users if name == "proxy_uid" else self.facts.groups
        found: list[p.IdRange] = []
        for word in filter(None, (each.strip() for each in text.split(","))):
            first, dash, last = word.partition("-") if ranges and word not in names else (word, "", "")
            low = _decimal(first) if dash else names.get(first, _decimal(first))
            high = _decimal(last) if dash else low
            if 0 <= low <= high < (1 << 32) - 1:
                found.append(p.IdRange(low, high))
            else:
                self._refuse(name, word, accepted)
        return tuple(found)

    def _cidrs(self, name: str) -> p.Everything | tuple[Cidr, ...]:
        if self._text(name) == "*":
            return "*"
        words = filter(None, self._text(name).split(","))
        return tuple(block for word in words if (block := self._cidr(name, word)))

    def _cidr(self, name: str, word: str) -> Cidr | None:
        """As netip.ParsePrefix: the length is required, host bits are allowed (iptables drops them).

        1.4 leaves a block to iptables, to which one address is one; 1.11 takes an address that is mapped to IPv6 for
        what it is.
        """
        host, slash, length = word.partition("/")
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            packed = socket.inet_pton(kind, host)
        except OSError:
            packed = b""
        bits = len(packed) * 8
        prefix = bits if self.oldest and not slash else _decimal(length)
        if not packed or not 0 <= prefix <= bits:
            spaces = "" if word == word.strip() else ", with no spaces around it"
            self._refuse(name, word.strip(), f"write a block as 10.0.0.0/8{spaces}")
            return None
        shift = bits - prefix
        block = Cidr((int.from_bytes(packed) >> shift << shift).to_bytes(len(packed)), prefix)
        return _as_ipv4(block) if self.version == "istio-1.11" else block

    def _names_loopback(self, include: p.Everything | tuple[Cidr, ...]) -> bool:
        """Is an address of the list, as written, one of loopback?"""
        hosts = [word.partition("/")[0] for word in self._list("istio_service_cidr")] if include != "*" else []
        return any(host.startswith("127.") or _is_localhost_6(host) for host in hosts)

    def _loopback(self) -> Cidr:
        name = "istio_outbound_ipv4_loopback_cidr"
        block = self._cidr(name, self._text(name))
        if block is None or block.family != "ip" or block.packed[0] != 127 or block.prefix < 8:
            self.faults.append(Fault(name.upper(), self._text(name), "write a block of 127.0.0.0/8"))
            return p.LOOPBACK[0]
        return block

    def _tunnel(self) -> tuple[Literal["inbound", "self-calls"], ...]:
        if self.oldest:
            return ()
        inbound: tuple[Literal["inbound"], ...] = () if self.tproxy else ("inbound",)
        return (*inbound, "self-calls") if self.version == "istio" else inbound

    def _inbound(self, proxy: p.Proxy, outer: int) -> p.Inbound:
        given = self.given
        everything = given.istio_inbound_ports == "*"
        excluded = self._ports("istio_local_exclude_ports")
        if self.version != "istio":
            excluded = (SSH, *excluded)
        ports = p.InboundPorts(
            "*" if everything else self._ports("istio_inbound_ports"), excluded if everything else ()
        )
        settings = p.TProxyRouting(
            p.Mark(self._number("istio_inbound_tproxy_mark", 1337)),
            self._number("istio_inbound_tproxy_route_table", 133),
            outer if self.oldest and outer != proxy.inbound_port else None,
            before_reroute=True,
        )
        local = p.Destinations(proxy.loopback if self.tproxy else ())
        return p.Inbound(self._mode(), ports, p.Sources(), local, settings, "last")

    def _number(self, name: str, unused: int) -> int:
        text = self._text(name)
        digits = text[2:] if text[:2] in ("0x", "0X") else ""
        hexadecimal = digits and not digits.strip("0123456789abcdefABCDEF")
        if 0 < (number := int(digits, 16) if hexadecimal else _decimal(text)) < 1 << 32:
            return number
        if self.tproxy:  # nobody else reads it
            self._refuse(name, text, "write a number of 1 to 4294967295")
        return unused

    def _owners(self) -> p.OwnerRules:
        """As ParseInterceptFilter: what is excluded counts only where everybody is included."""
        name, accepted = "istio_outbound_owner_groups", "write a group's id or name, or a range of ids as 1000-2000"
        include = self._list(name)
        if include == ["*"] or (not include and self.version != "istio"):  # older ones take an empty variable for unset
            excluded = self._ids(f"{name}_exclude", self._text(f"{name}_exclude"), accepted, ranges=True)
            return p.OwnerRules("*", p.Owners(gids=excluded))
        if len(include) > MAX_GROUPS:
            self._refuse(name, f"{len(include)} groups", f"write at most {MAX_GROUPS}")
        return p.OwnerRules(p.Owners(gids=self._ids(name, ",".join(include), accepted, ranges=True)))

    def _interfaces(self) -> p.Interfaces:
        reroute = tuple(p.Reroute(name, exclude=()) for name in self._names("kube_virt_interfaces"))
        return p.Interfaces(self._names("istio_exclude_interfaces"), reroute)

    def _names(self, name: str) -> tuple[str, ...]:
        """Names of devices, IFNAMSIZ of linux/if.h being 16; a trailing `+` stands for any rest."""
        words = self._list(name)
        for word in words:
            if len(word.encode()) > 15 or "/" in word or any(c.isspace() for c in word):
                self._refuse(name, word, "write the name of an interface, of at most 15 characters")
        return tuple(words)

    def _dns(self, gids: tuple[int, ...]) -> p.Dns:
        given = self.given
        if not given.redirect_dns:
            return p.Dns()
        if self.oldest:
            self._refuse("redirect_dns", "true", "leave it out: Istio 1.4 captures no DNS")
            return p.Dns()
        callers = p.Owners(gids=_ids(gids))
        servers = tuple(filter(None, map(_single, self.facts.servers)))
        if self.version == "istio-1.11":  # its rules stand even where no server is of IPv4
            servers = tuple(each for each in map(_as_ipv4, servers) if each.family == "ip")
            everything = (ALL_4,) if given.capture_all_dns else servers
            return p.Dns("servers", everything, udp_exempt="proxy", self_calls=callers)
        if given.capture_all_dns:
            return p.Dns("all", self_calls=callers)
        if not servers:
            return p.Dns()  # as Istio: a warning, and DNS is not captured
        return p.Dns("servers", servers, self_calls=callers)

    def _ipv6(self) -> bool:
        """By the first address that is neither loopback nor link-local; with dual_stack by any of IPv6."""
        global_ones = global_addresses(self.facts, link_local=self.version == "istio-1.11")
        if not global_ones:
            self.faults.append(Fault("addresses", "none but loopback and link-local", "give the namespace an address"))
            return False
        return any(len(packed) == 16 for packed in (global_ones if self.given.dual_stack else global_ones[:1]))


def _ipv6_of_1_11(plan: p.CapturePlan, first: p.Owners) -> p.Ipv6Groups | None:
    """Istio 1.11 has no TPROXY and no DNS for IPv6, and looks neither for loopback nor for virtual machines there."""
    reroute = plan.interfaces.reroute
    if plan.outbound.cidrs.include == "*":
        reroute = tuple(each._replace(include=()) for each in reroute)
    wanted = p.Ipv6Groups(
        plan.proxy._replace(tunnel_exempt=("inbound",), self_calls=first),
        plan.inbound._replace(mode="redirect", destinations=p.Destinations()),
        plan.outbound._replace(loopback="bypass"),
        plan.interfaces._replace(reroute=reroute),
        p.Dns(),
    )
    own = p.Ipv6Groups(**{name: new for name, new in wanted._asdict().items() if new != getattr(plan, name)})
    return None if own == p.Ipv6Groups() else own


def global_addresses(facts: Facts, *, link_local: bool = False) -> list[bytes]:
    """The addresses that are neither loopback nor, but with `link_local`, link-local; Istio goes by the first."""
    unmapped = map(_unmapped, facts.addresses)
    return [packed for packed in unmapped if not (_loopback(packed) if link_local else _local(packed))]


def _decimal(text: str) -> int:
    """A number, or -1 for what is none, or is another one to iptables, as 010 is eight."""
    plain = text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")
    return int(text) if plain and len(text) <= 10 else -1


def _ids(numbers: tuple[int, ...]) -> tuple[p.IdRange, ...]:
    return tuple(p.IdRange(number, number) for number in numbers)


def _single(text: str) -> Cidr | None:
    """The address of a resolver as a block; None where it is no address, as Istio passes over it."""
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except OSError:
        return None
    return Cidr(packed, len(packed) * 8)


def _unmapped(packed: bytes) -> bytes:
    return packed[12:] if packed[:12] == b"\0" * 10 + b"\xff\xff" else packed


def _as_ipv4(block: Cidr) -> Cidr:
    """A block of IPv4 that is mapped to IPv6, as what it is."""
    packed = _unmapped(block.packed)
    return Cidr(packed, block.prefix - 96) if packed != block.packed and block.prefix >= 96 else block


def _is_localhost_6(host: str) -> bool:
    try:
        return socket.inet_pton(socket.AF_INET6, host) == LOOPBACK_6.packed
    except OSError:
        return False


def _loopback(packed: bytes) -> bool:
    return packed[0] == 127 if len(packed) == 4 else packed == LOOPBACK_6.packed


def _local(packed: bytes) -> bool:
    """Loopback, or link-local unicast or multicast."""
    if len(packed) == 4:
        return _loopback(packed) or packed[:2] == b"\xa9\xfe" or packed[:3] == b"\xe0\0\0"
    link_local = packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
    return _loopback(packed) or link_local or (packed[0] == 0xFF and packed[1] & 0xF == 2)
