"""`apply --flush-conntrack`: what the new plan would treat otherwise is forgotten, and nothing else."""

from __future__ import annotations

import asyncio
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import netapply
from netapply.backend import BUILT_IN
from netapply.conformance.conntrack import entries
from netapply.lab import ADDRESSES, Lab, dns
from netapply.lab.actors import Actor
from netapply.lab.flows import APP_PORT
from netapply.lab.services import ask
from netapply.plan import CapturePlan, Dns, Inbound, InboundMode, InboundPorts, Outbound, OutboundPorts
from netapply.ruleset import FAMILIES, Family, PortRange
from tests.netns import Netns

each_backend = pytest.mark.parametrize("backend", tuple(BUILT_IN))


async def _ask_on(sock: socket.socket) -> str:
    """One more query on the same socket, and so of the same flow."""
    number = secrets.randbelow(0x10000)
    sock.send(dns.query(number))
    answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 4096), 2)
    return dns.answered_by(answer, number)


def _queries(actor: Actor, to: str) -> socket.socket:
    sock = actor.open("ip6" if ":" in to else "ip", socket.SOCK_DGRAM)
    sock.connect((to, 53))
    return sock


@each_backend
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flush", [True, False])
async def test_queries_of_a_socket_that_is_open_go_where_the_new_plan_says(
    backend: str, family: Family, flush: bool
) -> None:
    async with Lab() as lab:
        to = ADDRESSES[family].remote
        with (
            netapply.open(lab.pod.path) as capture,
            _queries(lab.actor("app"), to) as app,
            _queries(lab.actor("proxy"), to) as proxy,
        ):
            capture.apply(CapturePlan(), backend=backend)  # rules of any kind switch connection tracking on
            assert await _ask_on(app) == await _ask_on(proxy) == "dns-upstream"
            told = capture.apply(CapturePlan(dns=Dns("all", zones=False)), flush=flush).notes
            assert told == (("connection tracking forgot 1 flows",) if flush else ())
            assert await _ask_on(app) == ("dns-proxy" if flush else "dns-upstream")
            assert await _ask_on(proxy) == "dns-upstream"


@each_backend
async def test_a_connection_that_is_no_longer_captured_ends_and_others_stay(backend: str) -> None:
    async with Lab() as lab:
        remote = ADDRESSES["ip"].remote
        with netapply.open(lab.pod.path) as capture:
            capture.apply(CapturePlan(), backend=backend)
            first = await lab.actor("app").connect((remote, 80))
            second = await lab.actor("app").connect((remote, 443))
            with first, second:
                plan = CapturePlan(outbound=Outbound(ports=OutboundPorts(exclude=(PortRange(443, 443),))))
                result = capture.apply(plan, flush=True)
                assert any("forgot 1 flows" in note for note in result.notes)
                ports = {each.dport for each in entries(capture.namespace) if each.source == ADDRESSES["ip"].pod}
                assert 80 in ports
                assert b"15001" in await asyncio.wait_for(ask(first), 2)
                assert not capture.apply(plan, flush=True).notes


@each_backend
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("captured", [True, False])
async def test_an_inbound_connection_ends_only_where_nat_had_captured_it(
    backend: str, mode: InboundMode, family: Family, captured: bool
) -> None:
    """TPROXY keeps nothing in connection tracking, so its connections stay; so do those that nobody captured."""
    spared = InboundPorts(exclude=(PortRange(APP_PORT, APP_PORT),))
    plans = [CapturePlan(inbound=Inbound(mode, ports)) for ports in (spared, InboundPorts())]
    async with Lab() as lab:
        with netapply.open(lab.pod.path) as capture:
            capture.apply(plans[captured], backend=backend)
            inbound = await lab.actor("remote").connect((ADDRESSES[family].pod, APP_PORT))
            outbound = await lab.actor("app").connect((ADDRESSES[family].remote, 80))
            with inbound, outbound:
                assert "connection tracking forgot 1 flows" in capture.apply(plans[not captured], flush=True).notes
                assert b"15001" in await asyncio.wait_for(ask(outbound), 2)
                if captured and mode == "redirect":
                    with pytest.raises(ConnectionResetError):
                        await asyncio.wait_for(ask(inbound), 2)
                else:
                    answer = await asyncio.wait_for(ask(inbound), 2)
                    assert (b"15006" in answer) == captured


def test_the_command_tells_it(netns: Netns, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1"}')
    words = [sys.executable, "-m", "netapply", "apply", str(plan), "-N", netns.path, "--flush-conntrack"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "connection tracking forgot 0 flows" in done.stdout + done.stderr
