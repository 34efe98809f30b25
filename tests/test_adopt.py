"""`migrate --adopt`: away from what the real istio-iptables left in the kernel, under traffic; and back on failure.

The rules are listings of Istio's own commands (tests/data), restored by stock tools: nothing of them bears our tag, and
no journal knows of them. NETAPPLY_MIGRATIONS says how often each is left.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import netapply
from netapply.cli.demo import demo_plan
from netapply.dropin.run import whatever_istio_left
from netapply.errors import ApplyError, ValidationError
from netapply.lab import ADDRESSES, Lab
from netapply.lab.actors import Identity
from netapply.plan import CapturePlan
from netapply.planfile import dump_plan
from tests.netns import Netns
from tests.test_dropin import restore, routing_of, saved
from tests.test_istio_layout import MORE
from tests.test_migrate import _connect

ROUNDS = max(1, int(os.environ.get("NETAPPLY_MIGRATIONS", "1")) // 6)
DIRECTIONS = (
    ("legacy", "nftables"),
    ("legacy", "iptables-nft"),
    ("nft", "nftables"),
    ("nft", "iptables-legacy"),
)
each_direction = pytest.mark.parametrize(("flavour", "to"), DIRECTIONS)


class Left(NamedTuple):
    """A listing of Istio's, and which traffic it captures: by whom, to which port, in which families."""

    case: str
    plan: CapturePlan
    who: str
    families: tuple[str, ...]
    #: Whom the proxy runs as.
    proxy: Identity = Identity(1337, 1337)
    #: What its settings put into built-in chains that a plan without them knows nothing of.
    stays: tuple[str, ...] = ()


REDIRECT, TPROXY = demo_plan("redirect"), demo_plan("tproxy")
LEFT = {
    "outbound": Left(
        "istio/virt-all-ds", REDIRECT, "app", ("ip", "ip6"), stays=("-i eth2 -j RETURN", "-i eth1 -j RETURN")
    ),
    "inbound": Left("istio-1.11/wild-ds", REDIRECT, "remote", ("ip",)),
    "tproxy": Left("istio/wild-tproxy-ds", TPROXY, "remote", ("ip", "ip6"), Identity(0, 1337)),
}


def put_there(netns: Netns, flavour: str, left: Left) -> None:
    rules = next(case for case in MORE if case["id"] == left.case)["expect"]
    restore(netns, flavour, rules)
    if left.plan.inbound.mode == "tproxy":
        for family in ("-4", "-6"):
            netns.run("ip", family, "rule", "add", "fwmark", "1337", "lookup", "133")
            netns.run("ip", family, "route", "add", "local", "default", "dev", "lo", "table", "133")


def only(stays: tuple[str, ...], rules: dict[str, dict[str, dict[str, list[str]]]]) -> bool:
    """Whether nothing is left in any chain but these."""
    left = [
        rule for tables in rules.values() for chains in tables.values() for listed in chains.values() for rule in listed
    ]
    return {*left} == {*stays}


@each_direction
@pytest.mark.parametrize("kind", LEFT)
async def test_no_connection_escapes_while_istios_own_rules_are_left(
    kind: str, flavour: str, to: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    left = LEFT[kind]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(dump_plan(left.plan)))
    connections, wrong = 0, list[str]()
    for _ in range(ROUNDS):
        async with Lab(proxy=left.proxy) as lab:
            netns = Netns(-1)
            netns.path = lab.pod.path
            put_there(netns, flavour, left)
            state = str(tmp_path / f"state-{lab.pod.path.rpartition('/')[2]}")
            words = [
                "migrate",
                str(plan),
                "--to",
                to,
                "--adopt",
                "--no-probe",
                "-N",
                lab.pod.path,
                "--state-dir",
                state,
            ]
            counted = [0]
            clients = [
                asyncio.create_task(_connect(lab, counted, wrong, left.who, *way))
                for family in left.families
                for way in _ways(left, family)
                for _ in range(2)
            ]
            try:
                await _more(counted)
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "netapply", *words, stderr=subprocess.PIPE, stdout=subprocess.PIPE
                )
                _, said = await asyncio.wait_for(process.communicate(), 60)
                assert process.returncode == 0, said
                await _more(counted)
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
            connections += counted[0]
            assert only(left.stays, saved(netns, flavour))
            with netapply.open(lab.pod.path, state_directory=state) as capture:
                assert capture.verify(left.plan).same
                assert [each.backend for each in capture.live()] == [to]
                capture.clean()
            assert "fwmark" not in routing_of(netns)
    figure(f"{ROUNDS} migrations, {connections} connections, {len(wrong)} misdirected or refused")
    assert not wrong, wrong[:5]


def _ways(left: Left, family: str) -> list[tuple[tuple[str, int], int]]:
    ours = ADDRESSES[family]  # type: ignore[index]  # one of the two
    return [((ours.remote, 80), 15001)] if left.who == "app" else [((ours.pod, 8080), 15006)]


async def _more(counted: list[int], wanted: int = 8) -> None:
    """Until so many more connections have been made."""
    goal = counted[0] + wanted
    for _ in range(3000):
        if counted[0] >= goal:
            return
        await asyncio.sleep(0.01)
    pytest.fail("nobody connects any more")


@each_direction
@pytest.mark.parametrize("kind", LEFT)
@pytest.mark.parametrize("at", [1, 2])
def test_a_migration_from_istios_rules_that_fails_leaves_them_as_they_were(
    netns: Netns, kind: str, flavour: str, to: str, at: int, tmp_path: Path
) -> None:
    """While both stand, and at the end. The journal does not speak of what was not taken over, and clean leaves it.

    In iptables-legacy not: what was written once more in built-in chains bears our tag.
    """
    left, called = LEFT[kind], 0
    put_there(netns, flavour, left)
    before, routes = saved(netns, flavour), routing_of(netns)

    def proof() -> None:
        nonlocal called
        called += 1
        if called == at:
            raise ValidationError("planned")

    with netapply.open(netns.path, state_directory=str(tmp_path / "state")) as capture:
        with pytest.raises(ApplyError, match="planned") as raised:
            capture.migrate(left.plan, to, adopt=whatever_istio_left(capture), proof=proof)
        assert raised.value.restored
        assert (saved(netns, flavour), routing_of(netns)) == (before, routes)
        if flavour == "nft":
            assert capture.live() == ()
            capture.clean()
            assert (saved(netns, flavour), routing_of(netns)) == (before, routes)
