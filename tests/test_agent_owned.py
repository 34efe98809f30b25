"""Native tables that belong to the agent: nobody else changes them, and they outlast it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import netapply
from netapply import CapturePlan, KernelError, load_plan
from netapply.agent import Agent, AgentConfig, owning
from netapply.agent.owning import can_own
from netapply.namespace import Namespace
from tests.agents import in_thread, running, standing
from tests.netns import Netns

PLAN = load_plan("apiVersion: netapply/v1\nipv6: skip\n")
OTHER = load_plan("apiVersion: netapply/v1\nipv6: skip\noutbound: {ports: {exclude: [15020]}}\n")


@pytest.fixture(autouse=True)
def _able(netns: Netns) -> Iterator[None]:
    with Namespace.open(netns.path) as namespace:
        if not can_own(namespace):
            pytest.skip("this kernel has no tables that outlast their owner (Linux 6.9)")
    return


def refused(netns: Netns, *command: str) -> bool:
    with pytest.raises(AssertionError, match="Operation not permitted"):
        netns.run(*command)
    return True


async def test_others_cannot_change_it_and_a_flush_of_all_passes_it_by(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path, owned="auto") as (agent, record):
        await agent.apply(netns.path, PLAN)
        netns.run("nft", "add", "table", "inet", "theirs")
        await in_thread(lambda: netns.run("nft", "flush", "ruleset"))
        assert "theirs" not in netns.run("nft", "list", "tables")
        assert standing(netns.path, "nftables") is not None
        assert refused(netns, "nft", "delete", "table", "inet", "netapply")
        assert refused(netns, "nft", "flush", "chain", "inet", "netapply", "nat-output")
        await asyncio.sleep(0.1)
        assert not record.all("drifted")
        result = await agent.apply(netns.path, OTHER)
        assert result.changed
        await agent.remove(netns.path)
        assert standing(netns.path, "nftables") is None


async def test_it_outlasts_the_agent_and_the_next_one_adopts_it(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path, owned="auto") as (agent, _):
        await agent.apply(netns.path, PLAN)
        before = netns.run("nft", "-a", "list", "table", "inet", "netapply")
    await asyncio.sleep(0.1)  # its socket is closed a moment later
    orphan = netns.run("nft", "-a", "list", "table", "inet", "netapply")
    assert orphan.splitlines()[2:] == before.splitlines()[2:]
    async with running(tmp_path, owned="auto") as (agent, record):
        assert agent.status()[0].state == "inplace"
        after = netns.run("nft", "-a", "list", "table", "inet", "netapply")
        assert before.splitlines()[2:] == after.splitlines()[2:]  # the very same rules, handles and all
        assert refused(netns, "nft", "delete", "table", "inet", "netapply")
        assert (await agent.apply(netns.path, OTHER)).changed
        assert not record.all("failed")


async def test_a_socket_that_was_kept_owns_it_over_a_restart(tmp_path: Path, netns: Netns) -> None:
    """As the service manager keeps it: nobody can change the table meanwhile, and the next agent can at once."""
    config = AgentConfig(plans="", state=str(tmp_path / "state"), journal=str(tmp_path / "journal"), owned="auto")
    async with Agent(config) as agent:
        await agent.apply(netns.path, PLAN)
        kept = {key: os.dup(fd) for key, fd in agent.descriptors().items()}
    await asyncio.sleep(0.1)
    assert len(kept) == 1
    assert refused(netns, "nft", "delete", "table", "inet", "netapply")
    netns.run("nft", "flush", "ruleset")
    async with Agent(config, kept=kept) as agent:
        assert agent.status()[0].state == "inplace"
        assert agent.descriptors().keys() == kept.keys()
        for fd in kept.values():
            os.close(fd)
        assert (await agent.apply(netns.path, OTHER)).changed
        assert refused(netns, "nft", "delete", "table", "inet", "netapply")
        await agent.remove(netns.path)
        assert not agent.descriptors()


async def test_a_socket_that_was_kept_is_only_good_for_the_start(tmp_path: Path, netns: Netns) -> None:
    """Whoever kept it closes it once the agent has begun, and its number is soon another's."""
    config = AgentConfig(plans="", state=str(tmp_path / "state"), journal=str(tmp_path / "journal"), owned="auto")
    async with Agent(config) as agent:
        await agent.apply(netns.path, PLAN)
        kept = {key: os.dup(fd) for key, fd in agent.descriptors().items()}
    async with Agent(config, kept=kept) as agent:
        for fd in kept.values():
            os.close(fd)
        await agent.remove(netns.path)
        assert (await agent.apply(netns.path, PLAN)).changed
        assert refused(netns, "nft", "delete", "table", "inet", "netapply")


async def test_the_command_changes_it_when_no_agent_runs(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path, owned="auto") as (agent, _):
        await agent.apply(netns.path, PLAN)
    await asyncio.sleep(0.1)
    with netapply.open(netns.path, state_directory=str(tmp_path / "journal")) as capture:
        assert not capture.apply(PLAN).changed
        assert capture.apply(OTHER).changed
        assert capture.verify(OTHER).same
    await asyncio.sleep(0.1)
    with netapply.open(netns.path, state_directory=str(tmp_path / "journal")) as capture:
        assert capture.clean().changed
        assert capture.show() == ()


async def test_who_goes_past_the_agent_is_told_who_owns_it(tmp_path: Path, netns: Netns) -> None:
    async with running(tmp_path, owned="auto") as (agent, _):
        await agent.apply(netns.path, PLAN)

        def past() -> None:
            with netapply.open(netns.path, state_directory=str(tmp_path / "elsewhere")) as capture:
                assert not capture.apply(PLAN).changed  # to look is for everybody
                capture.clean()

        with pytest.raises(netapply.ApplyError) as raised:
            await in_thread(past)
        cause = raised.value.__cause__
        assert raised.value.restored
        assert isinstance(cause, KernelError)
        comm = await in_thread(Path("/proc/self/comm").read_text)
        assert f"table inet netapply belongs to {comm.strip()} (" in str(cause)
        assert "without --alone" in cause.next_step
        assert agent.status()[0].state == "inplace"


async def test_a_plain_table_that_stands_stays_one(tmp_path: Path, netns: Netns) -> None:
    with netapply.open(netns.path, state_directory=str(tmp_path / "journal")) as capture:
        capture.apply(PLAN)
    async with running(tmp_path, owned="auto") as (agent, record):
        assert not (await agent.apply(netns.path, PLAN)).changed
        netns.run("nft", "flush", "ruleset")
        await record.next("healed")
        assert refused(netns, "nft", "delete", "table", "inet", "netapply")


async def test_without_it_or_on_a_kernel_without_it_tables_are_plain(
    tmp_path: Path, netns: Netns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owning, "_can_own", [False])
    async with running(tmp_path, owned="auto") as (agent, record):
        await agent.apply(netns.path, CapturePlan()._replace(ipv6="skip"))
        netns.run("nft", "delete", "table", "inet", "netapply")
        await record.next("healed")
