"""The agent where others are in its way: locks that are held, clients that leave, files that are none."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from netapply import load_plan
from netapply.errors import NetapplyError
from netapply.plan import CapturePlan
from netapply.planfile import fingerprint
from tests.agents import in_thread, put, running, standing, until
from tests.netns import Netns

SIDECAR = load_plan("apiVersion: netapply/v1")
OTHER = load_plan('{"apiVersion": "netapply/v1", "outbound": {"ports": {"exclude": [22]}}}')
WAITING = load_plan('{"apiVersion": "netapply/v1", "activation": "on-listen"}')
BACKENDS = ("nftables", "iptables-nft", "iptables-legacy")


@contextmanager
def lock_held() -> Generator[None]:
    """As by an iptables that does not end."""
    with open(os.environ["XTABLES_LOCKFILE"], "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def flush(netns: Netns, backend: str, lock: Path) -> None:
    """Take our rules away; legacy ones as an iptables does that has a lock file of its own."""
    if backend == "iptables-legacy":
        netns.run("env", f"XTABLES_LOCKFILE={lock}", "iptables-legacy", "-t", "nat", "-F")
    else:
        netns.run("nft", "flush", "ruleset")


async def test_a_lock_that_is_held_delays_nobody_who_does_not_need_it(
    tmp_path: Path, make_netns: Callable[[], Netns]
) -> None:
    legacy, native = [make_netns() for _ in range(12)], [make_netns() for _ in range(4)]
    async with running(tmp_path, lock_timeout=1.0) as (agent, record):
        for each in legacy:
            await agent.apply(each.path, SIDECAR, backend="iptables-legacy")
        for each in native:
            await agent.apply(each.path, SIDECAR, backend="nftables")
        stood = standing(legacy[0].path, "iptables-legacy")
        with lock_held():
            for each in legacy:
                await in_thread(lambda each=each: flush(each, "iptables-legacy", tmp_path / "lock"))
            await record.next("failed")
            known, begun = len(record.events), time.monotonic()
            for each in native:
                await in_thread(lambda each=each: flush(each, "nftables", tmp_path / "lock"))
            for _ in native:
                healed = await record.next("healed", known)
                known = record.events.index(healed) + 1
            assert time.monotonic() - begun < 1.0
        await until(lambda: all(standing(each.path, "iptables-legacy") == stood for each in legacy))


async def test_the_agent_ends_in_time_though_a_lock_is_held(tmp_path: Path, make_netns: Callable[[], Netns]) -> None:
    many = [make_netns() for _ in range(12)]
    plans = tmp_path / "plans.d"
    plans.mkdir()
    selectors = ", ".join(f"{{path: {each.path}}}" for each in many)
    file = plans / "all.yaml"
    file.write_text(f"apiVersion: netapply/v1\nbackend: iptables-legacy\nnamespaces: [{selectors}]\n")
    with ExitStack() as stack:
        async with running(tmp_path, plans=str(plans), lock_timeout=1.0) as (agent, _):
            assert agent.metrics().namespaces["inplace"] == len(many)
            stack.enter_context(lock_held())
            file.unlink()  # so all are to be taken down
            await asyncio.sleep(0.2)
            begun = time.monotonic()
        assert time.monotonic() - begun < 2.0, "those that wait behind the lock need not try"


@pytest.mark.parametrize("back", ["at its time", "when asked"])
async def test_what_nobody_confirmed_goes_back_though_a_lock_was_held(tmp_path: Path, netns: Netns, back: str) -> None:
    async with running(tmp_path, lock_timeout=0.05) as (agent, record):
        await agent.apply(netns.path, SIDECAR, backend="iptables-legacy", confirm_within=0.3)
        await agent.apply(netns.path, OTHER, backend="iptables-legacy", confirm_within=0.5)
        with lock_held():
            if back == "when asked":
                with pytest.raises(NetapplyError):
                    await agent.go_back(netns.path)
                assert agent.status()[0].confirm_by
            await record.next("unconfirmed")
            await record.next("failed")
            assert standing(netns.path, "iptables-legacy")
        await until(lambda: not agent.status())
        assert standing(netns.path, "iptables-legacy") is None


async def test_what_nobody_could_confirm_goes_back_when_the_agent_is_there_again(
    tmp_path: Path, named_netns: Netns
) -> None:
    async with running(tmp_path) as (agent, _):
        await agent.apply(named_netns.name, SIDECAR, confirm_within=60)
        await agent.apply(named_netns.name, OTHER, confirm_within=60)
    assert standing(named_netns.path, "nftables")
    async with running(tmp_path) as (agent, record):
        await record.next("unconfirmed")
        await until(lambda: not agent.status())
        assert standing(named_netns.path, "nftables") is None
    async with running(tmp_path) as (agent, _):
        assert not agent.status()


async def test_a_plan_that_comes_back_while_it_is_withdrawn_is_kept(tmp_path: Path, netns: Netns) -> None:
    plans = tmp_path / "plans.d"
    plans.mkdir()
    file = plans / "a.yaml"
    text = f"apiVersion: netapply/v1\nbackend: iptables-legacy\nnamespaces: [{{path: {netns.path}}}]\n"
    file.write_text(text)
    async with running(tmp_path, plans=str(plans)) as (agent, record):
        with lock_held():
            file.unlink()
            await until(lambda: not agent.status()[0].source)
            file.write_text(text)
            await until(lambda: bool(agent.status()[0].source))
        await record.next("removed")
        await until(lambda: [each.state for each in agent.status()] == ["inplace"])
        assert standing(netns.path, "iptables-legacy")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("before", [None, OTHER], ids=["nothing", "another"])
async def test_a_cancelled_apply_is_in_force_and_kept_or_as_if_it_had_not_been(
    tmp_path: Path, make_netns: Callable[[], Netns], backend: str, before: CapturePlan | None
) -> None:
    plans = {fingerprint(SIDECAR): SIDECAR, fingerprint(OTHER): OTHER}
    stands = dict[str, object]()
    async with running(tmp_path) as (agent, _):
        for mark, plan in plans.items():
            netns = make_netns()
            await agent.apply(netns.path, plan, backend=backend)
            stands[mark] = standing(netns.path, backend)
            await agent.remove(netns.path)
        many = [make_netns() for _ in range(24)]
        for index, netns in enumerate(many):
            if before is not None:
                await agent.apply(netns.path, before, backend=backend)
            task = asyncio.create_task(agent.apply(netns.path, SIDECAR, backend=backend))
            await asyncio.sleep(index * 0.001)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        kept = {each.path: each.fingerprint for each in agent.status()}
        await agent.reconcile()
        for netns in many:
            assert netns.path in kept or before is None
            assert standing(netns.path, backend) == stands.get(kept.get(netns.path, ""))
    async with running(tmp_path) as (agent, _):
        assert {each.path: each.fingerprint for each in agent.status()} == kept


async def test_a_cancelled_apply_of_a_plan_that_waits_changes_no_wish(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path) as (agent, _):
        await agent.apply(netns.path, OTHER)
        stood = standing(netns.path, "nftables")
        for steps in range(1, 4):
            task = asyncio.create_task(agent.apply(netns.path, WAITING))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            (status,) = agent.status()
            if status.fingerprint == fingerprint(OTHER):
                await until(lambda: agent.status()[0].state == "inplace")
                assert standing(netns.path, "nftables") == stood
            else:
                assert (status.fingerprint, status.state) == (fingerprint(WAITING), "dormant")
                await agent.apply(netns.path, OTHER)


async def test_what_is_due_stays_due_though_whoever_asked_for_it_leaves(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path, poll=60.0) as (agent, _):
        await agent.apply(netns.path, SIDECAR)
        (keeper,) = agent._roster.keepers.values()
        stood = standing(netns.path, "nftables")
        for step in range(20):
            async with keeper._turn:  # so that it is his look that finds it
                await in_thread(lambda: put(netns.path, "nftables", None))
                task = asyncio.create_task(agent.reconcile(netns.path))
                await asyncio.sleep(0.005)
            await asyncio.sleep(step * 0.0001)
            task.cancel()
            await asyncio.wait([task])
            await until(lambda: standing(netns.path, "nftables") == stood, 5)


async def test_an_apply_that_meets_a_removal_is_in_force(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path) as (agent, _):
        for _ in range(10):
            await agent.apply(netns.path, OTHER)
            await asyncio.gather(agent.remove(netns.path), agent.apply(netns.path, SIDECAR))
            assert [each.fingerprint for each in agent.status()] == [fingerprint(SIDECAR)]
            assert standing(netns.path, "nftables")
            await agent.remove(netns.path)


async def test_a_namespace_is_let_go_though_whoever_asked_for_it_leaves(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path) as (agent, _):
        await agent.apply(netns.path, OTHER)
        (keeper,) = agent._roster.keepers.values()
        task = asyncio.create_task(agent.remove(netns.path))
        for _ in range(1000):  # it has its turn for some milliseconds only
            if keeper._turn.locked():
                break
            await asyncio.sleep(0)
        others = [asyncio.create_task(keeper.reconcile()) for _ in range(50)]  # who wait for their turn before him
        await until(lambda: keeper.closed)
        task.cancel()
        await asyncio.wait([task, *others])
        await agent.apply(netns.path, SIDECAR)
        assert standing(netns.path, "nftables")


async def test_what_is_no_plan_file_is_refused_at_once(tmp_path: Path, netns: Netns) -> None:
    plans = tmp_path / "plans.d"
    plans.mkdir()
    async with running(tmp_path, plans=str(plans)) as (_, record):
        (plans / "directory.yaml").mkdir()
        (plans / "link.yaml").symlink_to("/dev/zero")
        os.mkfifo(plans / "pipe.yaml")
        release = threading.Timer(5, lambda: os.open(plans / "pipe.yaml", os.O_RDWR | os.O_NONBLOCK))
        release.start()
        begun = time.monotonic()
        try:
            await until(lambda: len(record.all("file-rejected")) == 3)
        finally:
            release.cancel()
        assert time.monotonic() - begun < 2
