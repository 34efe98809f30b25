"""The agent's desired state: plan files and what they select, names that come and go, proxies that listen or not."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from netapply import load_plan
from netapply.agent import Target
from netapply.errors import NetapplyError
from tests import netns as namespaces
from tests.agents import in_thread, running, standing, until
from tests.netns import PREFIX, Netns

PLAN = "apiVersion: netapply/v1\n"
WAITING = load_plan('{"apiVersion": "netapply/v1", "activation": "on-listen", "inbound": {"mode": "none"}}')


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    directory = tmp_path / "plans.d"
    directory.mkdir()
    return directory


def write(plans: Path, name: str, *selectors: str, rest: str = "") -> Path:
    path = plans / name
    entries = "".join(f"  - {selector}\n" for selector in selectors)
    new = path.with_name("." + path.name)
    new.write_text(f"{PLAN}namespaces:\n{entries}{rest}")
    new.rename(path)
    return path


@contextmanager
def listening(netns: Netns, port: int = 15001) -> Iterator[None]:
    def listen() -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()
        return sock

    sock = netns.enter(listen)
    try:
        yield
    finally:
        sock.close()


@contextmanager
def lock_held() -> Iterator[None]:
    """As by an iptables that does not end."""
    with open(os.environ["XTABLES_LOCKFILE"], "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def test_a_plan_file_is_in_force_when_the_agent_has_started(
    tmp_path: Path, plans: Path, named_netns: Netns
) -> None:
    path = write(plans, "a.yaml", f"path: {named_netns.name}")
    async with running(tmp_path, plans=str(plans)) as (agent, record):
        (status,) = agent.status()
        assert (status.name, status.state, status.source) == (named_netns.name, "inplace", str(path))
        assert standing(named_netns.path, "nftables")
        assert [event.path for event in record.all("plan-changed")] == [str(path)]
        with pytest.raises(NetapplyError, match="plan file"):
            await agent.apply(named_netns.name, load_plan(PLAN))
        with pytest.raises(NetapplyError, match="plan file"):
            await agent.remove(named_netns.name)


async def test_plan_files_are_watched(tmp_path: Path, plans: Path, named_netns: Netns) -> None:
    async with running(tmp_path, plans=str(plans), poll=30) as (agent, record):
        path = write(plans, "a.yaml", f"path: {named_netns.name}")
        await record.next("applied")
        before = standing(named_netns.path, "nftables")
        known = len(record.events)
        write(plans, "a.yaml", f"path: {named_netns.name}", rest="outbound: {ports: {exclude: [22]}}\n")
        await record.next("applied", known)
        assert standing(named_netns.path, "nftables") not in (None, before)
        path.unlink()
        await record.next("removed")
        await until(lambda: agent.status() == ())
        assert standing(named_netns.path, "nftables") is None


async def test_a_bad_file_is_told_with_every_fault_and_the_last_good_state_stays(
    tmp_path: Path, plans: Path, named_netns: Netns
) -> None:
    path = write(plans, "a.yaml", f"path: {named_netns.name}")
    async with running(tmp_path, plans=str(plans)) as (agent, record):
        await until(lambda: agent.status()[0].state == "inplace")
        before = standing(named_netns.path, "nftables")
        path.write_text(PLAN + "namespaces: [{planet: x}]\nlayout: nonesuch\nproxy: {outboundPort: 0}\nnonsense: 1\n")
        rejected = await record.next("file-rejected")
        assert rejected.path == str(path)
        assert {"namespaces[0]", "layout", "nonsense"} <= {fault.path for fault in rejected.faults}
        assert len(rejected.faults) == 4
        assert agent.metrics().rejected_files == 1
        await agent.reconcile()
        assert standing(named_netns.path, "nftables") == before
        assert len(record.all("file-rejected")) == 1
    async with running(tmp_path, plans=str(plans)) as (agent, _):  # over a restart, too
        assert agent.status()[0].state == "inplace"
        write(plans, "a.yaml", f"path: {named_netns.name}")
        await until(lambda: agent.metrics().rejected_files == 0)


@pytest.mark.usefixtures("_swept")
async def test_a_namespace_that_appears_gets_its_plan_and_one_that_vanishes_is_let_go(
    tmp_path: Path, plans: Path
) -> None:
    name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    write(plans, "a.yaml", f"path: {name}")
    async with running(tmp_path, plans=str(plans), poll=30) as (agent, record):
        assert agent.status()[0].state == "gone"
        for _ in range(3):  # replaced by another of the same name
            known = len(record.events)
            with namespaces.named(name) as netns:
                await record.next("applied", known)
                assert standing(netns.path, "nftables")
                inode = netns.inode
                assert agent.status()[0].identity.inode == inode
            await record.next("vanished", known)
        assert agent.status()[0].state == "gone"
        assert agent.status()[0].identity is None


@pytest.mark.usefixtures("_swept")
async def test_a_glob_takes_what_appears(tmp_path: Path, plans: Path) -> None:
    tag = secrets.token_hex(4)
    write(plans, "a.yaml", f'glob: "/run/netns/{PREFIX}{os.getpid()}-{tag}*"')
    async with running(tmp_path, plans=str(plans), poll=30) as (agent, record):
        assert agent.status() == ()
        with namespaces.named(f"{PREFIX}{os.getpid()}-{tag}1") as one:
            await record.next("applied")
            assert standing(one.path, "nftables")
            assert len(agent.status()) == 1
        await record.next("vanished")
        await until(lambda: agent.status() == ())


async def test_a_pid_file_names_the_namespace_of_a_process(tmp_path: Path, plans: Path, netns: Netns) -> None:
    pidfile = tmp_path / "app.pid"
    write(plans, "a.yaml", f"pidFile: {pidfile}")
    process = netns.spawn("sleep", "60")
    try:
        await asyncio.sleep(0.2)  # until nsenter has entered
        async with running(tmp_path, plans=str(plans), poll=30) as (agent, record):
            pidfile.write_text(f"{process.pid}\n")
            await record.next("applied")
            assert standing(netns.path, "nftables")
            process.kill()
            process.wait()
            await record.next("vanished")
            await until(lambda: agent.status() == ())
    finally:
        process.kill()
        process.wait()


async def test_a_directory_that_comes_late_is_seen_with_what_is_in_it_already(
    tmp_path: Path, plans: Path, netns: Netns
) -> None:
    write(plans, "a.yaml", f"glob: {tmp_path}/late/ns-*")
    write(plans, "b.yaml", f"pidFile: {tmp_path}/app/app.pid")
    process = netns.spawn("sleep", "60")
    try:
        await asyncio.sleep(0.2)  # until nsenter has entered
        async with running(tmp_path, plans=str(plans)) as (agent, record):
            (tmp_path / "app.new").mkdir()
            (tmp_path / "app.new" / "app.pid").write_text(f"{process.pid}\n")
            (tmp_path / "app.new").rename(tmp_path / "app")
            await record.next("applied")
            assert [status.name for status in agent.status()] == [f"pid:{process.pid}"]
            (tmp_path / "late.new").mkdir()
            (tmp_path / "late.new" / "ns-1").touch()
            (tmp_path / "late.new").rename(tmp_path / "late")
            await until(lambda: len(agent.status()) == 2)
    finally:
        process.kill()
        process.wait()


async def test_plans_whose_directory_comes_late_are_read(tmp_path: Path, named_netns: Netns) -> None:
    async with running(tmp_path, plans=str(tmp_path / "late")) as (agent, _):
        (tmp_path / "new").mkdir()
        write(tmp_path / "new", "a.yaml", f"path: {named_netns.name}")
        (tmp_path / "new").rename(tmp_path / "late")
        await until(lambda: [status.state for status in agent.status()] == ["inplace"])


async def test_a_process_that_ends_while_its_plan_is_withdrawn_is_no_fault(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path) as (agent, _):
        await agent.apply(netns.path, load_plan(PLAN))
        (keeper,) = agent._roster.keepers.values()
        await keeper.close()  # as when the process has ended
        await keeper.withdraw()


async def test_what_cannot_be_taken_down_is_tried_again_until_it_is_gone(
    tmp_path: Path, plans: Path, named_netns: Netns
) -> None:
    path = write(plans, "a.yaml", f"path: {named_netns.name}", rest="backend: iptables-legacy\n")
    async with running(tmp_path, plans=str(plans), lock_timeout=0.05) as (agent, record):
        assert standing(named_netns.path, "iptables-legacy")
        with lock_held():
            path.unlink()
            await record.next("failed")
            assert [(each.state, each.fail_open_seconds) for each in agent.status()] == [("failed", 0.0)]
            assert standing(named_netns.path, "iptables-legacy")
        await record.next("removed")
        await until(lambda: not agent.status())
        assert standing(named_netns.path, "iptables-legacy") is None


async def test_labels_select_registered_namespaces(
    tmp_path: Path, plans: Path, make_netns: Callable[[], Netns]
) -> None:
    web, job = make_netns(), make_netns()
    write(plans, "a.yaml", "label: app=web")
    async with running(tmp_path, plans=str(plans)) as (agent, record):
        await agent.register(Target(web.path, {"app": "web", "tier": "front"}))
        await agent.register(Target(job.path, {"app": "job"}))
        await record.next("applied")
        assert standing(web.path, "nftables")
        assert standing(job.path, "nftables") is None
        await agent.unregister(web.path)
        await record.next("removed")
        assert standing(web.path, "nftables") is None


async def test_capture_waits_for_the_proxy(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path) as (agent, record):
        await agent.apply(netns.path, WAITING)
        assert agent.status()[0].state == "dormant"
        assert standing(netns.path, "nftables") is None
        with listening(netns):
            await record.next("listening")
            await until(lambda: agent.status()[0].state == "inplace")
            assert standing(netns.path, "nftables")
            assert agent.status()[0].fail_open_seconds > 0
        await asyncio.sleep(0.3)  # closed: a proxy that is gone does not open the way
        assert standing(netns.path, "nftables")


async def test_capture_that_fails_open_sleeps_again_when_the_proxy_stops(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path) as (agent, record):
        with listening(netns):
            await agent.apply(Target(netns.path, fail="open"), WAITING)
            assert agent.status()[0].state == "inplace"
        await record.next("dormant")
        assert standing(netns.path, "nftables") is None
        known = len(record.events)
        with listening(netns):
            await record.next("listening", known)
            await until(lambda: standing(netns.path, "nftables") is not None)


async def test_a_state_file_that_was_torn_is_no_obstacle(tmp_path: Path, netns: Netns) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "desired.json").write_text('{"format": 1, "files"')
    async with running(tmp_path) as (agent, _):
        await agent.apply(netns.path, load_plan(PLAN))
        kept = json.loads((tmp_path / "state" / "desired.json").read_text())
        assert len(kept["asked"]) == 1


async def test_two_names_of_one_namespace_do_not_fight(tmp_path: Path, named_netns: Netns) -> None:
    async with running(tmp_path) as (agent, _):
        await agent.apply(named_netns.name, load_plan(PLAN))
        with pytest.raises(NetapplyError, match="kept already"):
            await agent.apply(named_netns.path, load_plan(PLAN))
        assert len(agent.status()) == 1


async def test_the_machines_own_namespace_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as (agent, _):
        with pytest.raises(NetapplyError):
            await agent.apply("/proc/1/ns/net", load_plan(PLAN))


@pytest.mark.parametrize("named", [True, False], ids=["that a plan names", "that_no_plan_names"])
async def test_an_interrupted_run_is_undone_at_the_start(
    tmp_path: Path, plans: Path, named_netns: Netns, named: bool
) -> None:
    from netapply.core import NOWHERE, apply
    from netapply.journal import Entry, Journal
    from netapply.namespace import Namespace

    (tmp_path / "journal").mkdir(mode=0o700)
    journal = Journal(str(tmp_path / "journal"))
    with Namespace.open(named_netns.name) as namespace:
        apply(namespace, load_plan(PLAN), journal=journal)
        files = journal.acquire(namespace.identity, 5.0)
        entry = files.load()
        assert entry is not None
        files.begin(Entry(True, "nftables", NOWHERE, entry.desired, entry.created))
        files.close()
    if named:
        write(plans, "a.yaml", f"path: {named_netns.name}")
    async with running(tmp_path, plans=str(plans)) as (agent, record):
        assert (await record.next("recovered")).namespace == named_netns.name
        assert agent.metrics().recoveries == 1
        assert [status.state for status in agent.status()] == ["inplace"] * named


async def test_a_start_with_lo_down_is_made_good_when_lo_comes_up(
    tmp_path: Path, make_netns: Callable[..., Netns]
) -> None:
    netns = make_netns(lo=False)
    plan = load_plan('{"apiVersion": "netapply/v1", "inbound": {"mode": "tproxy"}}')
    async with running(tmp_path) as (agent, record):
        with pytest.raises(NetapplyError):
            await agent.apply(netns.path, plan)
        await in_thread(lambda: netns.run("ip", "link", "set", "lo", "up"))
        await agent.apply(netns.path, plan)
        assert agent.status()[0].state == "inplace"
        assert record.all("applied")
