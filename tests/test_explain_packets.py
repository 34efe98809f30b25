"""What `explain` says of a packet is what the kernel's counters say: the rules that matched counted it, no others."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pytest

import netapply
from netapply.api import Capture
from netapply.backend import BUILT_IN
from netapply.cli import main
from netapply.cli.demo import demo_plan
from netapply.importers.istio import Facts, plan_from_settings
from netapply.importers.istio_settings import IstioSettings
from netapply.lab import ADDRESSES, Identity, Lab
from netapply.lab.actors import SO_MARK, bind_anywhere
from netapply.plan import CapturePlan, Dns
from netapply.ruleset import FAMILIES, Family
from tests.test_istio_layout import packed

#: Each packet is one: it is gone behind our last rule, so that nobody answers. What the kernel sends by itself (ICMPv6)
#: is gone before our first.
ONE_PACKET_EACH = """
table inet test_end {
    chain early_out { type filter hook output priority -450; meta l4proto ipv6-icmp drop; }
    chain early_in { type filter hook prerouting priority -450; meta l4proto ipv6-icmp drop; }
    chain input { type filter hook input priority 1000; drop; }
    chain postrouting { type filter hook postrouting priority 1000; oifname != "lo" drop; }
}
"""
Counted = dict[tuple[str, str, int], int]


class Packet(NamedTuple):
    """What is sent, and by the same words what is asked. `local` is an address to bind, `mark` is the socket's."""

    actor: str
    uid: int
    gid: int
    to: tuple[str, int]
    udp: bool = False
    local: str = ""
    sport: int = 0
    mark: int = 0

    def words(self) -> list[str]:
        protocol = ["--udp" if self.udp else "--tcp"]
        host = f"[{self.local}]" if ":" in self.local else self.local
        source = [f"{host}:{self.sport}" if self.sport else host] if self.local or self.sport else []
        source += [f"mark={self.mark}"] if self.mark else []
        to = ["--to", f"[{self.to[0]}]:{self.to[1]}" if ":" in self.to[0] else f"{self.to[0]}:{self.to[1]}"]
        if self.actor == "remote":
            return [*protocol, "--inbound", "--from", *source, *to]
        return [*protocol, "--from", f"uid={self.uid}", f"gid={self.gid}", *source, *to]


def packets(family: Family, proxy: Identity, *, tproxy: bool) -> Iterator[Packet]:
    """Out, in, over lo and DNS, by everybody whom the rules tell apart."""
    ours = ADDRESSES[family]
    loopback, passthrough = ("::1", "::6") if family == "ip6" else ("127.0.0.1", "127.0.0.6")
    app, by_proxy, by_gid, root = (1000, 1000), tuple(proxy), (0, 1337), (0, 0)
    for who in (app, by_proxy, by_gid, (1337, 1337), root):
        yield Packet("app", *who, (ours.remote, 80))
        yield Packet("app", *who, (ours.pod, 8080))
        yield Packet("app", *who, (ours.pod, 15008))
        yield Packet("app", *who, (loopback, 15020))
        yield Packet("app", *who, (ours.remote, 53), udp=True)
        yield Packet("app", *who, (ours.elsewhere, 53))
    yield Packet("app", *app, (loopback, 53), udp=True)
    yield Packet("app", *app, (ours.pod, 53))
    yield Packet("app", *app, (ours.remote, 9090), udp=True)
    yield Packet("app", *by_proxy, (ours.pod, 8080), local=passthrough)
    if tproxy:
        yield Packet("app", *by_proxy, (ours.pod, 8080), mark=1337)
    for port in (8080, 15008, 15020, 53):
        yield Packet("remote", 0, 0, (ours.pod, port), local=ours.remote)
    yield Packet("remote", 0, 0, (ours.pod, 40001), udp=True, local=ours.remote, sport=53)


def send(lab: Lab, packet: Packet) -> None:
    """One SYN or datagram. The socket is closed before the kernel would send the SYN again."""
    family: Family = "ip6" if ":" in packet.to[0] else "ip"
    actor = lab.actor(packet.actor, uid=packet.uid, gid=packet.gid)
    with actor.open(family, socket.SOCK_DGRAM if packet.udp else socket.SOCK_STREAM) as sock:
        if packet.mark:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, packet.mark)
        if packet.local:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bind_anywhere(sock, (packet.local, packet.sport))
        with suppress(BlockingIOError, PermissionError):  # EPERM: it was dropped at our own hook, as was meant
            sock.sendto(b"?", packet.to) if packet.udp else sock.connect(packet.to)


def counters(capture: Capture, backend: str) -> Counted:
    rules = capture.show(backend=backend, layout="istio")
    return {(f"{rule.family} {rule.table}", rule.chain, rule.position + 1): rule.packets for rule in rules}


def explained(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["explain", "-o", "json", *words]) == 0
    (one,) = json.loads(capsys.readouterr().out)["explanations"]
    found: dict[str, Any] = one
    return found


def matched(explanation: dict[str, Any]) -> list[tuple[str, str, int]]:
    """The rules that it says matched, as often as it says so."""
    return [
        (rule["table"], rule["chain"], rule["position"])
        for hook in explanation["hooks"]
        for rule in hook["rules"]
        if rule["matched"]
    ]


def plan_of(layout: str, mode: str) -> CapturePlan:
    if layout == "netapply":
        return demo_plan(mode)._replace(dns=Dns("all"))  # type: ignore[arg-type]  # one of the two literals
    settings = IstioSettings(
        istio_inbound_interception_mode=mode.upper(),
        istio_inbound_ports="*",
        istio_local_exclude_ports="15090,15021,15020",
        istio_service_cidr="*",
        redirect_dns=True,
        capture_all_dns=True,
        dual_stack=True,
    )
    addresses = tuple(packed(ADDRESSES[family].pod) for family in FAMILIES)
    return plan_from_settings(settings, "istio", Facts(addresses))


@contextmanager
def ended(lab: Lab) -> Iterator[None]:
    """Packets have an end behind our rules."""

    def nft(*words: str, stdin: str = "") -> None:
        command = ["nsenter", f"--net={lab.pod.path}", "nft", *words]
        subprocess.run(command, input=stdin, text=True, capture_output=True, timeout=10, check=True)

    nft("-f", "-", stdin=ONE_PACKET_EACH)
    yield
    nft("delete", "table", "inet", "test_end")


@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
@pytest.mark.parametrize("layout", ["netapply", "istio"])
@pytest.mark.parametrize("backend", BUILT_IN)
async def test_the_rules_that_matched_counted_the_packet_and_no_other_rule_did(
    backend: str, layout: str, mode: str, capsys: pytest.CaptureFixture[str], figure: Any
) -> None:
    proxy = Identity(0, 1337) if (layout, mode) == ("istio", "tproxy") else Identity(1337, 1337)
    sent = 0
    async with Lab(proxy=proxy) as lab:
        with netapply.open(lab.pod.path) as capture, ended(lab):
            capture.apply(plan_of(layout, mode), backend=backend, layout=layout)
            for family in lab.families:
                for packet in packets(family, proxy, tproxy=mode == "tproxy"):
                    said = matched(explained(["-N", lab.pod.path, *packet.words()], capsys))
                    before = counters(capture, backend)
                    send(lab, packet)
                    after = counters(capture, backend)
                    counted = {where: count - before[where] for where, count in after.items() if count != before[where]}
                    assert counted == {where: said.count(where) for where in said}, packet
                    sent += 1
    figure(f"{sent} packets counted as explained")
