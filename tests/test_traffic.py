"""Meaning, by packets, in every dialect: the six traffic types, DNS, IPv6 modes, and updates under traffic."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

import netapply
from netapply.api import Capture
from netapply.backend import BUILT_IN
from netapply.cli.demo import demo_plan
from netapply.lab import ADDRESSES, Lab, traffic_types
from netapply.plan import (
    CapturePlan,
    Dns,
    IdRange,
    Inbound,
    InboundPorts,
    Interfaces,
    Outbound,
    OutboundCidrs,
    OutboundPorts,
    OwnerRules,
    Owners,
    Reroute,
    Sources,
)
from netapply.ruleset import FAMILIES, Cidr, PortRange
from tests.strategies import masked

each_backend = pytest.mark.parametrize("backend", tuple(BUILT_IN))


@contextlib.contextmanager
def captured(lab: Lab, plan: CapturePlan, backend: str) -> Iterator[Capture]:
    with netapply.open(lab.pod.path) as capture:
        capture.apply(plan, backend=backend)
        yield capture


@each_backend
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
async def test_the_six_traffic_types_go_where_they_should(
    backend: str, mode: str, figure: Callable[[str], None]
) -> None:
    async with Lab() as lab:
        with captured(lab, demo_plan(mode), backend) as capture:  # type: ignore[arg-type]  # one of the two literals
            for traffic in traffic_types(mode, lab.families):  # type: ignore[arg-type]  # likewise
                answer = await lab.send(traffic.send)
                assert not traffic.expect.faults(answer), (traffic.name, traffic.family)
            figure(f"{len(traffic_types(mode, lab.families))} flows right")  # type: ignore[arg-type]  # likewise
            capture.clean()
        for traffic in traffic_types("direct", lab.families):
            assert not traffic.expect.faults(await lab.send(traffic.send)), traffic.name


def _conntrack(lab: Lab) -> str:
    shown = ""
    for family in ("ipv4", "ipv6"):
        command = ["nsenter", f"--net={lab.pod.path}", "conntrack", "-L", "-f", family]
        shown += subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    return shown


@each_backend
@pytest.mark.parametrize("capture_mode", ["all", "servers"])
async def test_dns_is_captured_over_udp_and_tcp_and_leaves_no_unreplied_pair(
    backend: str, capture_mode: str, figure: Callable[[str], None]
) -> None:
    """The client is answered by the proxy, the proxy's own query by the server, and conntrack sees both replied."""
    async with Lab() as lab:
        servers = tuple(_host(ADDRESSES[family].remote) for family in FAMILIES)
        plan = CapturePlan(dns=Dns(capture_mode, servers if capture_mode == "servers" else ()))  # type: ignore[arg-type]
        with captured(lab, plan, backend):
            for family in lab.families:
                server = (ADDRESSES[family].remote, 53)
                for over in ("udp", "tcp"):
                    assert (await lab.dns("app", server, over=over)).who == "dns-proxy"  # type: ignore[arg-type]
                    assert (await lab.dns("proxy", server, over=over)).who == "dns-upstream"  # type: ignore[arg-type]
            table = _conntrack(lab)
            assert "zone=2" in table
            assert "zone=1" in table
            figure(f"{table.count('src=') // 2} conntrack entries, {table.count('UNREPLIED')} UNREPLIED")
            assert "UNREPLIED" not in table


@each_backend
async def test_dns_of_exempt_processes_and_unlisted_servers_goes_out_and_is_replied(backend: str) -> None:
    async with Lab() as lab:
        listed = tuple(_host(ADDRESSES[family].remote) for family in FAMILIES)
        exempt = OwnerRules(exclude=Owners(uids=(IdRange(2000, 2000),)))
        plan = CapturePlan(dns=Dns("servers", listed), outbound=Outbound(owners=exempt))
        with captured(lab, plan, backend):
            for family in lab.families:
                ours = ADDRESSES[family]
                assert (await lab.dns("app", (ours.remote, 53), uid=2000)).who == "dns-upstream"
                assert (await lab.dns("app", (ours.elsewhere, 53))).who == "dns-upstream"
            assert "UNREPLIED" not in _conntrack(lab)


@each_backend
async def test_dns_can_go_to_an_address(backend: str) -> None:
    """DNAT instead of REDIRECT: the query reaches the given address and port."""
    async with Lab() as lab:
        local = (b"\x7f\0\0\1", b"\0" * 15 + b"\1")
        with captured(lab, CapturePlan(dns=Dns("all", addresses=local)), backend):
            for family in lab.families:
                for over in ("udp", "tcp"):
                    answer = await lab.dns("app", (ADDRESSES[family].elsewhere, 53), over=over)  # type: ignore[arg-type]
                    assert answer.who == "dns-proxy"


@each_backend
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
async def test_blocked_ipv6_is_dropped_where_it_would_have_been_captured(backend: str, mode: str) -> None:
    async with Lab() as lab:
        plan = demo_plan(mode)._replace(ipv6="block")  # type: ignore[arg-type]
        with captured(lab, plan, backend):
            four, six = ADDRESSES["ip"], ADDRESSES["ip6"]
            assert (await lab.tcp("app", (four.remote, 80))).via_ports == (15001,)
            assert (await lab.tcp("app", (six.remote, 80), timeout=0.3)).error == "timeout"
            assert (await lab.tcp("remote", (six.pod, 8080), timeout=0.3)).error == "timeout"
            assert (await lab.tcp("remote", (six.pod, 15021))).who == "health"
            assert (await lab.tcp("proxy", (six.remote, 80))).who == "remote"
            assert (await lab.tcp("app", (six.pod, 8080))).who == "app"


@each_backend
async def test_skipped_ipv6_is_left_alone(backend: str) -> None:
    async with Lab() as lab:
        with captured(lab, CapturePlan(ipv6="skip"), backend):
            six = ADDRESSES["ip6"]
            assert (await lab.tcp("app", (six.remote, 80))).via_ports == ()
            assert (await lab.tcp("remote", (six.pod, 8080))).via_ports == ()


@each_backend
@pytest.mark.parametrize("blocks", [1, 60])
async def test_lists_exclude_what_they_name_and_nothing_else(backend: str, blocks: int) -> None:
    """Short lists are rules, long ones sets; both mean the same."""
    async with Lab() as lab:
        filler = tuple(Cidr(bytes((10, 1, i, 0)), 24) for i in range(blocks - 1))
        filler += tuple(Cidr(b"\xfd\xaa" + bytes((0, i)) + b"\0" * 12, 32) for i in range(blocks - 1))
        for family in lab.families:
            ours = ADDRESSES[family]
            excluded = tuple(sorted((*filler, masked(_host(ours.elsewhere).packed, 24 if family == "ip" else 48))))
            plan = CapturePlan(
                outbound=Outbound(
                    cidrs=OutboundCidrs(exclude=excluded),
                    ports=OutboundPorts(exclude=(PortRange(440, 450),)),
                    owners=OwnerRules(exclude=Owners(uids=(IdRange(1500, 1599),))),
                ),
                inbound=Inbound(sources=Sources((_host(ours.remote),)), ports=InboundPorts((PortRange(8080, 8080),))),
            )
            with captured(lab, plan, backend):
                assert (await lab.tcp("app", (ours.elsewhere, 80))).via_ports == ()
                assert (await lab.tcp("app", (ours.remote, 80))).via_ports == (15001,)
                assert (await lab.tcp("app", (ours.remote, 443))).via_ports == ()
                assert (await lab.tcp("app", (ours.remote, 80), uid=1599)).via_ports == ()
                assert (await lab.tcp("app", (ours.remote, 80), uid=1600)).via_ports == (15001,)
                assert (await lab.tcp("remote", (ours.pod, 8080))).via_ports == ()


@each_backend
async def test_a_rerouted_interface_is_captured_as_outbound(backend: str) -> None:
    async with Lab() as lab:
        plan = CapturePlan(interfaces=Interfaces(reroute=(Reroute("eth+"),)))
        with captured(lab, plan, backend):
            for family in lab.families:
                assert (await lab.tcp("remote", (ADDRESSES[family].pod, 8080))).via_ports[:1] == (15001,)


@each_backend
async def test_an_excluded_interface_is_left_alone(backend: str) -> None:
    async with Lab() as lab:
        with captured(lab, CapturePlan(interfaces=Interfaces(exclude=("eth0",))), backend):
            for family in lab.families:
                ours = ADDRESSES[family]
                assert (await lab.tcp("remote", (ours.pod, 8080))).via_ports == ()
                assert (await lab.tcp("app", (ours.remote, 80))).via_ports == ()


@each_backend
async def test_open_connections_are_counted_and_stay_as_they_were(backend: str) -> None:
    async with Lab() as lab:
        actor = lab.actor("app")
        loop = asyncio.get_running_loop()
        with actor.open("ip") as sock, netapply.open(lab.pod.path) as capture:
            await loop.sock_connect(sock, (ADDRESSES["ip"].remote, 80))
            result = capture.apply(CapturePlan(), backend=backend)
            assert result.existing_flows == 1
            assert capture.apply(CapturePlan()).existing_flows == 0


@dataclass
class Seen:
    """Who answered, over all connections of a run."""

    connections: int = 0
    wrong: list[str] = field(default_factory=list)


UPDATES = 1000

_UPDATER = """
import sys, time, netapply
from netapply.plan import CapturePlan, OutboundCidrs, Outbound
from netapply.ruleset import Cidr
path, backend, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with netapply.open(path) as capture:
    for i in range(count):
        block = Cidr(bytes((10, i >> 8 & 255, i & 255, 0)), 24)
        plan = CapturePlan(outbound=Outbound(cidrs=OutboundCidrs(exclude=(block,))))
        assert capture.apply(plan, backend=backend).changed
"""


@each_backend
async def test_no_connection_is_misdirected_or_refused_while_rules_are_updated(
    backend: str, figure: Callable[[str], None]
) -> None:
    """1,000 updates by another process under continuous connects, out and in."""
    async with Lab() as lab:
        with captured(lab, CapturePlan(), backend):
            arguments = [sys.executable, "-c", _UPDATER, lab.pod.path.replace("self", ""), backend, str(UPDATES)]
            updater = await asyncio.create_subprocess_exec(*arguments)
            seen = Seen()
            clients = [asyncio.create_task(_connect(lab, seen, *way)) for way in _ways()]
            try:
                assert await asyncio.wait_for(updater.wait(), 120) == 0
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
        figure(f"{UPDATES} updates, {seen.connections} connections, {len(seen.wrong)} misdirected or refused")
        assert not seen.wrong
        assert seen.connections > 500


def _ways() -> list[tuple[str, tuple[str, int], int]]:
    ways: list[tuple[str, tuple[str, int], int]] = []
    for family in FAMILIES:
        ways.append(("app", (ADDRESSES[family].remote, 80), 15001))
        ways.append(("remote", (ADDRESSES[family].pod, 8080), 15006))
    return ways


async def _connect(lab: Lab, seen: Seen, source: str, to: tuple[str, int], port: int) -> None:
    while True:
        answer = await lab.tcp(source, to, timeout=5.0)
        seen.connections += 1
        if answer.via_ports[:1] != (port,) or answer.error:
            seen.wrong.append(f"{source} to {to}: {answer}")


def _host(text: str) -> Cidr:
    import socket

    packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    return Cidr(packed, len(packed) * 8)


def test_the_demo_says_in_json_what_it_says_in_text() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "netapply", "demo", "--backend", "nftables", "--mode", "redirect"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"26 of 26 flows went as expected", done.stdout)
