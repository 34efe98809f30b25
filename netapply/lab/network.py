"""The wires of the lab: veth pairs, addresses and routes of two namespaces, through pyroute2.

On each wire the pod has one address a family, and so has the remote side, which besides answers for every address that
is nobody's, so that one namespace plays the whole rest of the world. By default there is one wire.
"""

from __future__ import annotations

import errno
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pyroute2  # pyright: ignore[reportMissingTypeStubs]  # it ships none

from netapply.errors import KernelError
from netapply.lab.namespaces import PATIENCE, Place
from netapply.ruleset import FAMILIES, Family
from netapply.values import NamedTuple

IFACE = "eth0"  # the same name on both sides, as in a pod
LO_INDEX = 1  # always (net/core/dev.c: the loopback device is registered first)
IFA_F_NODAD = 2  # linux/if_addr.h: usable at once
RTN_LOCAL = 2  # linux/rtnetlink.h: a route to this host itself
NUD_PERMANENT = 0x80  # linux/neighbour.h
MAIN_TABLE, LOCAL_TABLE = 254, 255  # linux/rtnetlink.h: RT_TABLE_MAIN, RT_TABLE_LOCAL
MARKS, AFTER_MARKS = 20000, 30000  # preferences of policy rules, before that of the main table (32766)
FIRST_TABLE = 100  # of routes by wire


_AF: dict[Family, int] = {"ip": socket.AF_INET, "ip6": socket.AF_INET6}


class Addresses(NamedTuple):
    """One family's addresses. `virtual` belongs to no host: a service that the proxy alone knows how to reach."""

    pod: str
    remote: str
    prefix: int
    elsewhere: str
    virtual: str
    default: str


ADDRESSES: dict[Family, Addresses] = {
    "ip": Addresses(
        pod="10.77.0.2",
        remote="10.77.0.1",
        prefix=24,
        elsewhere="198.51.100.7",
        virtual="203.0.113.10",
        default="0.0.0.0/0",
    ),
    "ip6": Addresses(
        pod="fd77::2",
        remote="fd77::1",
        prefix=64,
        elsewhere="2001:db8:7::7",
        virtual="2001:db8:10::10",
        default="::/0",
    ),
}


class Wire(NamedTuple):
    """One veth pair. `number` is in its addresses: 10.77.NUMBER.0/24 and fd77:NUMBER::/64; eth0 is number 0."""

    device: str
    number: int

    def pod(self, family: Family) -> str:
        """The pod's address on this wire."""
        return f"10.77.{self.number}.2" if family == "ip" else f"{self._net6}::2"

    def remote(self, family: Family) -> str:
        """The remote side's address on this wire."""
        return f"10.77.{self.number}.1" if family == "ip" else f"{self._net6}::1"

    @property
    def mark(self) -> int:
        """What the remote side sends with this mark goes out by this wire, wherever it goes to."""
        return FIRST_TABLE + self.number

    @property
    def _net6(self) -> str:
        return f"fd77:{self.number:x}" if self.number else "fd77"

    def mac(self, *, of_pod: bool) -> str:
        """Locally administered."""
        return f"02:00:00:00:{self.number:02x}:{'02' if of_pod else '01'}"


WIRES = (Wire(IFACE, 0),)


def connect(pod: Place, remote: Place, wires: tuple[Wire, ...] = WIRES) -> tuple[Family, ...]:
    """Join the two, give them addresses and routes; returns the families that work here (no "ip6" where it is off).

    Raises KernelError, with EOPNOTSUPP where the kernel has no veth.
    """
    try:
        pod.inside(lambda: _join(remote.fd, wires))
        families = FAMILIES if pod.inside(_has_ipv6) else FAMILIES[:1]
        pod.inside(lambda: _configure(families, wires, is_pod=True))
        remote.inside(lambda: _configure(families, wires, is_pod=False))
        pod.inside(lambda: _await_ready([(wire.device, wire.pod(family)) for wire in wires for family in families]))
        remote.inside(
            lambda: _await_ready([(wire.device, wire.remote(family)) for wire in wires for family in families])
        )
    except pyroute2.NetlinkError as error:
        raise KernelError("join the namespaces of the lab by a veth pair", cast("int", error.code)) from error
    return families


def _join(peer_fd: int, wires: tuple[Wire, ...]) -> None:
    with _route_socket() as ipr:
        for wire in wires:
            peer = {"ifname": wire.device, "address": wire.mac(of_pod=False), "net_ns_fd": peer_fd}
            ipr.link("add", ifname=wire.device, address=wire.mac(of_pod=True), kind="veth", peer=peer)


def _has_ipv6() -> bool:
    """Whether this kernel has IPv6, and it can be switched on in this namespace."""
    for device in ("all", "lo", IFACE):
        _set(f"net/ipv6/conf/{device}/disable_ipv6", "0")
    try:
        return Path(f"/proc/sys/net/ipv6/conf/{IFACE}/disable_ipv6").read_text("ascii").strip() == "0"
    except OSError:
        return False


def _configure(families: tuple[Family, ...], wires: tuple[Wire, ...], *, is_pod: bool) -> None:
    for device in ("all", "default", "lo", *(wire.device for wire in wires)):
        # New namespaces inherit the machine's setting; a strict filter there would drop TPROXY's packets over lo.
        _set(f"net/ipv4/conf/{device}/rp_filter", "0")
        if not is_pod:  # what the pod forwards comes back to where it came from
            _set(f"net/ipv4/conf/{device}/accept_local", "1")
        if "ip6" in families:
            _set(f"net/ipv6/conf/{device}/disable_ipv6", "0")
            # Nothing is sent and nothing changes but by what somebody does: no solicitation, no link-local address.
            _set(f"net/ipv6/conf/{device}/router_solicitations", "0")
            _set(f"net/ipv6/conf/{device}/addr_gen_mode", "1")
    with _route_socket() as ipr:
        ipr.link("set", index=LO_INDEX, state="up")
        for wire in wires:
            index = ipr.link_lookup(ifname=wire.device)[0]
            ipr.link("set", index=index, state="up")
            for family in families:
                _put_up(ipr, wire, index, family, is_pod=is_pod)
        if not is_pod:
            _answer_for_everything(ipr, families)


def _answer_for_everything(ipr: Any, families: tuple[Family, ...]) -> None:
    """Every address that no wire leads to is this host's own; what is marked goes out by its wire all the same.

    IPv4 wants the route in the table of local addresses, or nothing is sent from them (route.c: __ip_dev_find).
    """
    for family in families:
        number, everything = _AF[family], ADDRESSES[family].default
        ipr.rule("add", family=number, table=LOCAL_TABLE, priority=AFTER_MARKS)
        ipr.rule("del", family=number, table=LOCAL_TABLE, priority=0)
        table = LOCAL_TABLE if family == "ip" else MAIN_TABLE
        ipr.route("replace", dst=everything, type="local", scope="host", oif=LO_INDEX, table=table)


def _put_up(ipr: Any, wire: Wire, index: int, family: Family, *, is_pod: bool) -> None:
    """One family's addresses of one wire, and the routes that lead to it."""
    own, peer = (wire.pod(family), wire.remote(family)) if is_pod else (wire.remote(family), wire.pod(family))
    ipr.addr("add", index=index, address=own, prefixlen=ADDRESSES[family].prefix, flags=IFA_F_NODAD)
    # A permanent neighbour: solicitations would wait for the link-local address to pass duplicate detection.
    ipr.neigh("add", dst=peer, lladdr=wire.mac(of_pod=not is_pod), ifindex=index, state=NUD_PERMANENT)
    everything = ADDRESSES[family].default
    if is_pod and wire.number == 0:
        ipr.route("add", dst=everything, gateway=peer)
        return
    ipr.route("add", dst=everything, gateway=peer, oif=index, table=wire.mark)
    by = {"src": own, "src_len": 32 if family == "ip" else 128} if is_pod else {"fwmark": wire.mark}
    ipr.rule("add", family=_AF[family], table=wire.mark, priority=MARKS + wire.number, **by)
    if family == "ip" and not is_pod:
        ipr.route("add", dst=f"10.77.{wire.number}.0/24", oif=index, scope="link", table=LOCAL_TABLE)


def _await_ready(expected: list[tuple[str, str]]) -> None:
    """Wait until each device sends and its address is delivered; raises KernelError after 2.5 s.

    Both come after the calls that asked for them, when the kernel's link watcher and its IPv6 address worker get
    the routing lock: on a busy machine hundreds of milliseconds later. What is sent before is lost without an error.
    """
    deadline = time.monotonic() + PATIENCE / 2
    with _route_socket() as ipr:
        for device, address in expected:
            index = ipr.link_lookup(ifname=device)[0]
            while (
                ipr.link("get", index=index)[0].get_attr("IFLA_OPERSTATE") != "UP"
                or ipr.route("get", dst=address)[0]["type"] != RTN_LOCAL
            ):
                if time.monotonic() > deadline:
                    raise KernelError("wait for the veth pairs of the lab", errno.ETIMEDOUT)
                time.sleep(0.001)


def _route_socket() -> Any:
    """An rtnetlink socket of the thread's namespace (never `netns=`, which forks). pyroute2 has no types."""
    return pyroute2.IPRoute()


def _set(name: str, value: str) -> None:
    with suppress(OSError):  # absent without IPv6, read-only in a container
        Path(f"/proc/sys/{name}").write_text(value, "ascii")
