"""Canary connections say what becomes of each kind of connection, and are believed: the rules are broken to see it."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import netapply
from netapply.backend import BUILT_IN
from netapply.canary import prove, send_canaries
from netapply.cli.demo import demo_plan
from netapply.errors import ApplyError, KernelError, ValidationError
from netapply.plan import CapturePlan, Dns, Inbound, Outbound, OutboundCidrs
from netapply.ruleset import Cidr
from tests.netns import Netns

each_backend = pytest.mark.parametrize("backend", tuple(BUILT_IN))
COMMAND = [sys.executable, "-m", "netapply"]


@each_backend
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_every_kind_goes_where_the_plan_says(netns: Netns, backend: str, mode: str) -> None:
    plan = demo_plan(mode)._replace(dns=Dns("all"))  # type: ignore[arg-type]  # one of the two literals
    with netapply.open(netns.path) as capture:
        capture.apply(plan, backend=backend)
        sent = prove(capture.namespace, plan)
        assert [(each.kind, each.family, each.fate) for each in sent] == [
            (kind, family, "passed" if kind == "proxy" else "captured")
            for family in (4, 6)
            for kind in ("outbound", "proxy", "dns", "inbound")
        ]
        assert {each.answered_by for each in sent} == {"a listener of ours", "the world"}
        assert "canary" not in netns.run("ip", "link")
        assert capture.verify(plan).same


#: What stands in the place of what is wanted, and the connections that it lets escape.
ESCAPES: dict[str, tuple[Callable[[CapturePlan], CapturePlan], set[tuple[str, int]]]] = {
    "outbound": (
        lambda plan: plan._replace(outbound=Outbound(cidrs=OutboundCidrs(include=()))),
        {("outbound", 4), ("outbound", 6)},
    ),
    "outbound ip": (
        lambda plan: plan._replace(outbound=Outbound(cidrs=OutboundCidrs(exclude=(Cidr(b"\xc0\0\2\0", 24),)))),
        {("outbound", 4)},
    ),
    "inbound": (lambda plan: plan._replace(inbound=Inbound("none")), {("inbound", 4), ("inbound", 6)}),
    "dns": (lambda plan: plan._replace(dns=Dns("none")), {("dns", 4), ("dns", 6)}),
    "ipv6": (lambda plan: plan._replace(ipv6="skip"), {("outbound", 6), ("dns", 6), ("inbound", 6)}),
}


@each_backend
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
@pytest.mark.parametrize("what", ESCAPES)
def test_each_kind_that_escapes_is_noticed_and_no_other(netns: Netns, backend: str, mode: str, what: str) -> None:
    wanted = demo_plan(mode)._replace(dns=Dns("all"))  # type: ignore[arg-type]  # one of the two literals
    change, escapes = ESCAPES[what]
    with netapply.open(netns.path) as capture:
        capture.apply(change(wanted), backend=backend)
        sent = send_canaries(capture.namespace, wanted)
        assert {(each.kind, each.family) for each in sent if not each.right} == escapes
        with pytest.raises(ValidationError) as raised:
            prove(capture.namespace, wanted)
        assert raised.value.exit_code == 126
        for kind, family in escapes:
            assert f"{kind} ip{'6' if family == 6 else ''}: " in str(raised.value)


def test_without_rules_everything_passes(netns: Netns) -> None:
    with netapply.open(netns.path) as capture:
        assert {each.fate for each in send_canaries(capture.namespace, CapturePlan())} == {"passed"}
        with pytest.raises(ValidationError, match=r"4 of 6 connections did not go") as raised:
            prove(capture.namespace, CapturePlan())
        assert raised.value.exit_code == 126


def test_what_the_plan_leaves_alone_is_to_pass(netns: Netns) -> None:
    plan = CapturePlan(outbound=Outbound(cidrs=OutboundCidrs(include=(Cidr(b"\x0a\0\0\0", 8),))))
    with netapply.open(netns.path) as capture:
        capture.apply(plan)
        assert [each.fate for each in prove(capture.namespace, plan) if each.kind == "outbound"] == ["passed"] * 2


def test_blocked_ipv6_is_lost(netns: Netns) -> None:
    plan = CapturePlan(ipv6="block")
    with netapply.open(netns.path) as capture:
        capture.apply(plan)
        assert {each.fate for each in prove(capture.namespace, plan) if each.family == 6} == {"lost", "passed"}


def test_the_proxy_itself_answers_where_it_listens(netns: Netns) -> None:
    def listen() -> socket.socket:
        sock = socket.socket(socket.AF_INET6)
        sock.bind(("", 15001))
        sock.listen()
        return sock

    with netns.enter(listen), netapply.open(netns.path) as capture:
        capture.apply(CapturePlan())
        told = {each.kind: each.answered_by for each in prove(capture.namespace, CapturePlan())}
    assert told == {"outbound": "the proxy", "proxy": "the world", "inbound": "a listener of ours"}


def test_a_proxy_that_is_turned_back_to_itself_is_noticed(netns: Netns) -> None:
    with netapply.open(netns.path) as capture:
        capture.apply(CapturePlan()._replace(proxy=CapturePlan().proxy._replace(uids=(99,), gids=())))
        with pytest.raises(ValidationError, match="proxy ip: by the plan bypass, refused"):
            prove(capture.namespace, CapturePlan())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)


@each_backend
def test_an_apply_whose_probe_fails_is_rolled_back(netns: Netns, tmp_path: Path, backend: str) -> None:
    """Somebody's rules come first, and let all pass: ours stand, and capture nothing."""
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1"}')
    netns.run("nft", "-f", "-", stdin=AWAY)
    words = ("apply", str(plan), "-N", netns.path, "--backend", backend, "--probe", "-o", "json")
    done = run(*words)
    assert done.returncode == 126, done.stdout + done.stderr
    assert "did not go where the plan says" in done.stdout + done.stderr
    with netapply.open(netns.path) as capture:
        assert capture.show() == ()
    assert netns.run("nft", "list", "tables").split() == ["table", "inet", "away"]
    netns.run("nft", "delete", "table", "inet", "away")
    told = json.loads(run(*words).stdout)
    assert {each["fate"] for each in told["canaries"]} == {"captured", "passed"}
    assert all(each["right"] for each in told["canaries"])
    netns.run("nft", "-f", "-", stdin=AWAY)
    assert run("verify", str(plan), "-N", netns.path).returncode == 0
    done = run("verify", str(plan), "-N", netns.path, "--probe")
    assert done.returncode == 126
    with netapply.open(netns.path) as capture, pytest.raises(ApplyError) as raised:
        capture.migrate(
            CapturePlan(),
            "nftables" if backend != "nftables" else "iptables-nft",
            proof=lambda: void(prove(capture.namespace, CapturePlan())),
        )
    assert raised.value.restored
    assert raised.value.exit_code == 126


#: To where the packet goes anyway: a mapping of NAT that changes nothing, and decides for the connection.
AWAY = """
table inet away {
    chain output {
        type nat hook output priority -150
        oifname "canary*" ip daddr 192.0.2.2 dnat ip to 192.0.2.2
    }
}
"""


def void(_: object) -> None:
    pass


def test_where_there_is_no_device_it_is_said(netns: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr("netapply.canary.Tun", lambda: refuse(None))
    with netapply.open(netns.path) as capture, pytest.raises(KernelError, match="TUN device") as raised:
        send_canaries(capture.namespace, CapturePlan())
    assert "/dev/net/tun" in raised.value.next_step


def test_a_probe_without_a_plan_is_refused(netns: Netns) -> None:
    done = run("verify", "-N", netns.path, "--probe")
    assert done.returncode == 1
    assert "netapply verify PLAN --probe" in done.stderr


@pytest.mark.parametrize("words", [("--no-probe",), ()])
def test_the_command_migrates_with_canaries_or_without(netns: Netns, tmp_path: Path, words: tuple[str, ...]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1", "inbound": {"mode": "tproxy"}}')
    assert run("apply", str(plan), "-N", netns.path, "--backend", "iptables-legacy").returncode == 0
    done = run("migrate", str(plan), "--to", "nftables", "-N", netns.path, "-o", "json", *words)
    assert done.returncode == 0, done.stdout
    assert len(json.loads(done.stdout)["canaries"]) == (0 if words else 6)
