"""From dialect to dialect under traffic: no connection misdirected, none refused; and back on any failure.

NETAPPLY_MIGRATIONS says how many migrations each direction takes; a few are enough to see it work, and
docs/reliability.md tells of 1,000.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import netapply
from netapply.backend import BUILT_IN, find_backend
from netapply.cli.demo import demo_plan
from netapply.errors import ApplyError, ConflictError, NetapplyError, ValidationError
from netapply.lab import ADDRESSES, Lab
from netapply.ownership import ownership
from netapply.plan import CapturePlan
from netapply.ruleset import Routing
from netapply.transaction import Transaction
from tests import foreign
from tests.netns import Netns
from tests.test_dropin import add_addresses

MIGRATIONS = int(os.environ.get("NETAPPLY_MIGRATIONS", "6"))
CLIENTS = 2
PAIRS = tuple(itertools.combinations(BUILT_IN, 2))
each_pair = pytest.mark.parametrize(("one", "other"), PAIRS)
each_direction = pytest.mark.parametrize(("one", "other"), tuple(itertools.permutations(BUILT_IN, 2)))

_MIGRATE = """
import sys, netapply
from netapply.cli.demo import demo_plan
path, mode, count, *names = sys.argv[1:]
plan = demo_plan(mode)
with netapply.open(path) as capture:
    for i in range(int(count)):
        for name in names:
            assert capture.migrate(plan, name).reason.startswith("from ")
"""


async def _connect(lab: Lab, counted: list[int], wrong: list[str], source: str, to: tuple[str, int], port: int) -> None:
    while True:
        if port == 53:
            answer = await lab.dns(source, to, timeout=5.0)
            right = answer.who == "dns-proxy"
        else:
            answer = await lab.tcp(source, to, timeout=5.0)
            right = answer.via_ports == (port,)
        counted[0] += 1
        if answer.error or not right:
            wrong.append(f"{source} to {to}: {answer}")


def _ways(lab: Lab) -> list[tuple[str, tuple[str, int], int]]:
    ways: list[tuple[str, tuple[str, int], int]] = []
    for family in lab.families:
        ours = ADDRESSES[family]
        ways += [("app", (ours.remote, 80), 15001), ("remote", (ours.pod, 8080), 15006)]
    return ways


async def _under_traffic(lab: Lab, script: str, *arguments: str) -> tuple[int, list[str]]:
    counted, wrong = [0], list[str]()
    clients = [asyncio.create_task(_connect(lab, counted, wrong, *way)) for way in _ways(lab) for _ in range(CLIENTS)]
    try:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, *arguments)
        assert await asyncio.wait_for(process.wait(), 600) == 0
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return counted[0], wrong


@each_pair
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
async def test_no_connection_is_misdirected_or_refused_by_migrations(
    one: str, other: str, mode: str, figure: Callable[[str], None]
) -> None:
    async with Lab() as lab:
        plan = demo_plan(mode)  # type: ignore[arg-type]  # one of the two literals
        with netapply.open(lab.pod.path) as capture:
            capture.apply(plan, backend=one)
            place = lab.pod.path.replace("self", "")
            connections, wrong = await _under_traffic(lab, _MIGRATE, place, mode, str(MIGRATIONS), other, one)
            assert [each.backend for each in capture.detect().candidates if each.ours] == [one]
            assert capture.verify(plan).same
    figure(f"{2 * MIGRATIONS} migrations, {connections} connections, {len(wrong)} misdirected or refused")
    assert not wrong, wrong[:5]
    assert connections > 8 * CLIENTS


@each_direction
@pytest.mark.parametrize("after", [False, True])
def test_a_migration_that_fails_is_undone(
    netns: Netns, one: str, other: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any of its parts: bringing each dialect to each stage, before and after; the foreign rules are all there."""
    plan = demo_plan("tproxy")
    for backend in (one, other):
        foreign.put_up(netns, backend)
    with netapply.open(netns.path) as capture:
        capture.apply(plan, backend=one)
        before = [each.rule for each in capture.show()]
        real, others = Transaction.bring, foreign.picture(netns)
        for stage in range(1, 5):
            called = 0

            def failing(self: Transaction, *arguments: Any, stage: int = stage) -> Routing:
                nonlocal called
                called += 1
                if called == stage and not after:
                    raise NetapplyError("planned")
                done = real(self, *arguments)
                if called == stage:
                    raise NetapplyError("planned")
                return done

            with monkeypatch.context() as patch:
                patch.setattr(Transaction, "bring", failing)
                with pytest.raises(ApplyError, match="planned") as raised:
                    capture.migrate(plan, other)
            assert raised.value.restored
            assert [each.rule for each in capture.show()] == before
            assert [each.backend for each in capture.live()] == [one]
            assert capture.verify().same
        after_all = foreign.picture(netns)
        assert after_all["ip rule"] == others["ip rule"]
        assert "DOCKER" in after_all["iptables-legacy-save -c"] + after_all["iptables-nft-save -c"]
        assert capture.migrate(plan, other).reason == f"from {one}"
        assert [each.backend for each in capture.live()] == [other]


def test_a_proof_that_fails_takes_the_migration_back(netns: Netns) -> None:
    def proof() -> None:
        raise ValidationError("nobody answered")

    with netapply.open(netns.path) as capture:
        capture.apply(CapturePlan(), backend="iptables-legacy")
        with pytest.raises(ApplyError, match="while both stand: nobody answered") as raised:
            capture.migrate(CapturePlan(), "nftables", proof=proof)
        assert raised.value.restored
        assert capture.verify().backend == "iptables-legacy"


_DIE = """
import os, signal, sys, netapply
from netapply.cli.demo import demo_plan
from netapply.ruleset import Routing
from netapply.transaction import Transaction
path, to, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
real, called = Transaction._do, 0
def dying(self, name, work):
    global called
    called += 1
    if called == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, name, work)
Transaction._do = dying
with netapply.open(path) as capture:
    capture.migrate(demo_plan("tproxy"), to)
"""


@each_direction
def test_a_migration_that_is_killed_is_finished_or_undone_by_the_next_command(
    netns: Netns, one: str, other: str, figure: Callable[[str], None]
) -> None:
    """Before each of its steps; then the whole of one dialect stands, nothing of the other, and routing once."""
    plan, told, at = demo_plan("tproxy"), dict[str, int](), 0
    with netapply.open(netns.path) as capture:
        capture.apply(plan, backend=one)
        while True:
            at += 1
            done = subprocess.run(
                [sys.executable, "-c", _DIE, netns.path, other, str(at)], timeout=60, check=False, capture_output=True
            )
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            reason = capture.recover().reason
            told[reason] = told.get(reason, 0) + 1
            (standing,) = capture.live()
            assert standing.backend in (one, other)
            assert capture.verify().same
            assert capture.verify(plan).same
            if standing.backend == other:
                capture.migrate(plan, one)
    figure(f"{sum(told.values())} kills: {told}")
    assert at > 3


def test_rules_in_two_dialects_are_not_migrated(netns: Netns) -> None:
    with netapply.open(netns.path) as capture, netapply.open(netns.path) as another:
        capture.apply(CapturePlan(), backend="nftables")
        wanted = capture.live()[0]
        legacy = find_backend("iptables-legacy")
        from netapply.compiler import compile_plan

        for step in legacy.encode(
            legacy.read(another.namespace, ownership("netapply")), compile_plan(CapturePlan(), legacy.dialect)
        ):
            legacy.commit(another.namespace, step)
        with pytest.raises(ConflictError, match="2 dialects"):
            capture.migrate(CapturePlan(), "iptables-nft")
        assert wanted.backend == "nftables"


@pytest.mark.parametrize("to", ["nftables", "iptables-legacy"])
def test_what_istio_left_is_left_behind(netns: Netns, tmp_path: Path, to: str) -> None:
    """Put up in iptables-nft as Istio's own commands do; the tags are lost in a save and a restore."""
    add_addresses(netns, "10.99.0.2/24", "fd99::2/64")
    command = [sys.executable, "-m", "netapply"]
    subprocess.run(
        [*command, "istio-iptables", "--network-namespace", netns.path, "--backend", "iptables-nft"],
        check=True,
        timeout=60,
        capture_output=True,
    )
    for six in ("", "6"):
        saved = netns.run(f"ip{six}tables-nft-save")
        netns.run(f"ip{six}tables-nft-restore", stdin=saved)
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1"}')
    arguments = ["migrate", str(plan), "--to", to, "-N", netns.path, "--state-dir", str(tmp_path / "fresh")]
    done = subprocess.run([*command, *arguments, "--adopt"], timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "from iptables-nft" in done.stdout
    for six in ("", "6"):
        assert "ISTIO" not in netns.run(f"ip{six}tables-nft-save")
    with netapply.open(netns.path, state_directory=str(tmp_path / "fresh")) as capture:
        assert capture.verify().same
        assert [each.operation for each in netapply.history.events(capture.journal, "")] == ["migrate"]
