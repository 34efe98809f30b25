"""The wire of the lab: a veth pair, addresses and routes of two namespaces, through pyroute2.

The pod has one address a family. The remote side has one too, and besides answers for every documentation address
(RFC 5737, RFC 3849), so that one namespace plays the whole rest of the world.
"""

from __future__ import annotations

import errno
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyroute2  # pyright: ignore[reportMissingTypeStubs]  # it ships none

from netapply.errors import KernelError
from netapply.lab.namespaces import PATIENCE, Place
from netapply.ruleset import FAMILIES, Family

IFACE = "eth0"  # the same name on both sides, as in a pod
MAC_POD, MAC_REMOTE = "02:00:00:00:00:02", "02:00:00:00:00:01"  # locally administered
LO_INDEX = 1  # always (net/core/dev.c: the loopback device is registered first)
IFA_F_NODAD = 2  # linux/if_addr.h: usable at once
RTN_LOCAL = 2  # linux/rtnetlink.h: a route to this host itself
NUD_PERMANENT = 0x80  # linux/neighbour.h
LOCAL_TABLE = 255  # linux/rtnetlink.h: RT_TABLE_LOCAL


class Addresses(NamedTuple):
    """One family's addresses. `virtual` belongs to no host: a service that the proxy alone knows how to reach."""

    pod: str
    remote: str
    prefix: int
    elsewhere: str
    virtual: str
    documentation: tuple[str, ...]
    default: str


ADDRESSES: dict[Family, Addresses] = {
    "ip": Addresses(
        pod="10.77.0.2",
        remote="10.77.0.1",
        prefix=24,
        elsewhere="198.51.100.7",
        virtual="203.0.113.10",
        documentation=("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"),
        default="0.0.0.0/0",
    ),
    "ip6": Addresses(
        pod="fd77::2",
        remote="fd77::1",
        prefix=64,
        elsewhere="2001:db8:7::7",
        virtual="2001:db8:10::10",
        documentation=("2001:db8::/32",),
        default="::/0",
    ),
}


def connect(pod: Place, remote: Place) -> tuple[Family, ...]:
    """Join the two, give them addresses and routes; returns the families that work here (no "ip6" where it is off).

    Raises KernelError, with EOPNOTSUPP where the kernel has no veth.
    """
    try:
        pod.inside(lambda: _join(remote.fd))
        families = FAMILIES if pod.inside(_has_ipv6) else FAMILIES[:1]
        pod.inside(lambda: _configure(families, is_pod=True))
        remote.inside(lambda: _configure(families, is_pod=False))
        pod.inside(lambda: _await_ready(tuple(ADDRESSES[family].pod for family in families)))
        remote.inside(lambda: _await_ready(tuple(ADDRESSES[family].remote for family in families)))
    except pyroute2.NetlinkError as error:
        raise KernelError("join the namespaces of the lab by a veth pair", cast("int", error.code)) from error
    return families


def _join(peer_fd: int) -> None:
    with _route_socket() as ipr:
        peer = {"ifname": IFACE, "address": MAC_REMOTE, "net_ns_fd": peer_fd}
        ipr.link("add", ifname=IFACE, address=MAC_POD, kind="veth", peer=peer)


def _has_ipv6() -> bool:
    """Whether this kernel has IPv6, and it can be switched on in this namespace."""
    for device in ("all", "lo", IFACE):
        _set(f"net/ipv6/conf/{device}/disable_ipv6", "0")
    try:
        return Path(f"/proc/sys/net/ipv6/conf/{IFACE}/disable_ipv6").read_text("ascii").strip() == "0"
    except OSError:
        return False


def _configure(families: tuple[Family, ...], *, is_pod: bool) -> None:
    for device in ("all", "default", "lo", IFACE):
        # New namespaces inherit the machine's setting; a strict filter there would drop TPROXY's packets over lo.
        _set(f"net/ipv4/conf/{device}/rp_filter", "0")
    if "ip6" in families:
        for device in ("all", "lo", IFACE):
            _set(f"net/ipv6/conf/{device}/disable_ipv6", "0")
    with _route_socket() as ipr:
        index = ipr.link_lookup(ifname=IFACE)[0]
        for number in (LO_INDEX, index):
            ipr.link("set", index=number, state="up")
        for family in families:
            ours = ADDRESSES[family]
            own, peer = (ours.pod, ours.remote) if is_pod else (ours.remote, ours.pod)
            ipr.addr("add", index=index, address=own, prefixlen=ours.prefix, flags=IFA_F_NODAD)
            # A permanent neighbour: solicitations would wait for the link-local address to pass duplicate detection.
            mac = MAC_REMOTE if is_pod else MAC_POD
            ipr.neigh("add", dst=peer, lladdr=mac, ifindex=index, state=NUD_PERMANENT)
            ipr.route("add", dst=ours.default, gateway=peer)
            for block in ours.documentation[: 0 if is_pod else None]:
                ipr.route("add", dst=block, type="local", scope="host", oif=LO_INDEX, table=LOCAL_TABLE)


def _await_ready(addresses: tuple[str, ...]) -> None:
    """Wait until the device sends and the namespace's own addresses are delivered; raises KernelError after 2.5 s.

    Both come after the calls that asked for them, when the kernel's link watcher and its IPv6 address worker get
    the routing lock: on a busy machine hundreds of milliseconds later. What is sent before is lost without an error.
    """
    deadline = time.monotonic() + PATIENCE / 2
    with _route_socket() as ipr:
        index = ipr.link_lookup(ifname=IFACE)[0]
        while ipr.link("get", index=index)[0].get_attr("IFLA_OPERSTATE") != "UP" or any(
            ipr.route("get", dst=address)[0]["type"] != RTN_LOCAL for address in addresses
        ):
            if time.monotonic() > deadline:
                raise KernelError("wait for the veth pair of the lab", errno.ETIMEDOUT)
            time.sleep(0.001)


def _route_socket() -> Any:
    """An rtnetlink socket of the thread's namespace (never `netns=`, which forks). pyroute2 has no types."""
    return pyroute2.IPRoute()


def _set(name: str, value: str) -> None:
    with suppress(OSError):  # absent without IPv6, read-only in a container
        Path(f"/proc/sys/{name}").write_text(value, "ascii")
