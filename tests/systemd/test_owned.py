"""`--owned auto` on a real systemd: whatever befalls the agent, the table is its own, and no connection goes astray."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.systemd.machine import PYTHON, Machine, lacking
from tests.systemd.test_service import FILED, PLAN, connections, end, file_plan, install, main_pid, restarted, states

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

FILE = "/etc/netapply/plans.d/test.yaml"
DROP_IN = "/etc/systemd/system/netapply.service.d/test.conf"
OWNED, ORPHANED = 0x2 | 0x4, 0x4  # NFT_TABLE_F_OWNER and NFT_TABLE_F_PERSIST of linux/netfilter/nf_tables.h
HOST = "/proc/1/ns/net"
ABLE = """\
from netapply.agent.owning import can_own
from netapply.namespace import Namespace
print(can_own(Namespace.open("pod")))
"""


class Table(NamedTuple):
    """Our table at a moment; `owner` is a netlink port, 0 for none."""

    flags: int
    owner: int
    handle: int


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("machine"), {Path(__file__).parent: "/opt/tests"}) as machine:
        install(machine, "--owned", "auto", "--host")
        if machine.run(PYTHON, "-c", ABLE) != "True\n":
            pytest.skip("this kernel has no tables that outlast their owner (Linux 6.9)")
        yield machine


@pytest.fixture(autouse=True)
def _as_new(machine: Machine) -> Iterator[None]:
    yield
    machine.run("sh", "-c", f"rm -rf /etc/netapply/plans.d/* {DROP_IN}")
    machine.systemctl("daemon-reload")
    machine.systemctl("start", "netapply.service")
    machine.until(lambda: not states(machine), "plans are still in force")
    machine.systemctl("restart", "netapply.service")


@contextmanager
def watched(machine: Machine, name: str = "pod") -> Iterator[list[Table | None]]:
    """Look at our table all the time; afterwards, each state that it came to."""
    program = machine.spawn(PYTHON, "/opt/tests/table.py", name)
    seen: list[Table | None] = []
    try:
        assert program.stdout
        assert program.stdout.readline() == "ready\n"
        yield seen
        seen += [each and Table(*each) for each in json.loads(program.communicate("end\n", timeout=30)[0])]
    finally:
        end(program)


def in_pod(machine: Machine, *command: str, check: bool = True) -> str:
    return machine.run("ip", "netns", "exec", "pod", *command, check=check)


def rules(machine: Machine) -> list[str]:
    """The table's rules with their handles; not who owns it."""
    return in_pod(machine, "nft", "-sa", "list", "table", "inet", "netapply").splitlines()[2:]


def parked(machine: Machine) -> int:
    """How many descriptors systemd keeps."""
    return int(machine.show("netapply.service", "NFileDescriptorStore")["NFileDescriptorStore"])


def refuses(machine: Machine) -> bool:
    """Whether somebody else may neither change nor delete the table, and his flush of everything passes it by."""
    tries = ("delete table inet netapply", "flush table inet netapply", "add chain inet netapply theirs")
    said = [in_pod(machine, "nft", *words.split(), check=False) for words in tries]
    in_pod(machine, "nft", "flush", "ruleset")
    return all("Operation not permitted" in each for each in said)


def file_owned(machine: Machine) -> None:
    """The plan is in force, and systemd has the table's owner."""
    file_plan(machine)
    machine.until(lambda: parked(machine) == 1, "the owner was not kept")


def kill(machine: Machine) -> int:
    """The pid that was killed."""
    pid = main_pid(machine)
    machine.run("kill", "-9", str(pid))
    return pid


def excluding(port: int) -> str:
    return FILED + f"outbound: {{ports: {{exclude: [{port}]}}}}\n"


def change(machine: Machine, port: int) -> None:
    """Another plan, and it is in force."""
    file_plan(machine, excluding(port))
    machine.until(lambda: str(port) in "".join(rules(machine)), "it was not changed")


def complaints(machine: Machine) -> list[str]:
    """What the agent itself warned of."""
    lines = machine.run("journalctl", "-u", "netapply", "-o", "cat", "--no-pager", "-p", "warning").splitlines()
    return [line for line in lines if line.startswith("{")]


def brief(machine: Machine) -> None:
    """A namespace that is held to a plan, with an end that is seen from outside: a link in the peer goes with it."""
    machine.run("ip", "netns", "add", "brief")
    link = "-n brief link add name eth0 type veth peer name brief netns peer"
    machine.run("ip", *link.split())
    file_plan(machine, PLAN + "namespaces: [{path: brief}]\n")
    machine.until(lambda: parked(machine) == 1, "the owner was not kept")


def has_ended(machine: Machine) -> bool:
    return "brief" not in machine.run("ip", "-n", "peer", "link")


def test_nobody_else_changes_its_table_and_a_flush_of_everything_passes_it_by(machine: Machine) -> None:
    file_owned(machine)
    before = rules(machine)
    with connections(machine) as answers, watched(machine) as seen:
        in_pod(machine, "nft", "add", "table", "inet", "theirs")
        assert refuses(machine)
        assert "theirs" not in in_pod(machine, "nft", "list", "tables")
    assert set(answers) == {"proxy"}, answers
    assert [table and table.flags for table in seen] == [OWNED]
    assert rules(machine) == before


def test_nftables_service_and_firewalld_pass_it_by(machine: Machine) -> None:
    file_plan(machine, PLAN + f"namespaces: [{{path: {HOST}}}]\n")
    before = machine.run("nft", "-sa", "list", "table", "inet", "netapply")
    healed = machine.run("journalctl", "-u", "netapply", "-o", "cat").count('"event": "healed"')
    try:
        with watched(machine, HOST) as seen:
            machine.systemctl("restart", "nftables.service")  # its file begins with: flush ruleset
            machine.systemctl("stop", "nftables.service")
            machine.systemctl("start", "firewalld.service")
            machine.run("firewall-cmd", "--reload")
            machine.run("firewall-cmd", "--complete-reload")
    finally:
        machine.systemctl("stop", "firewalld.service")
    assert [table and table.flags for table in seen] == [OWNED]
    assert machine.run("nft", "-sa", "list", "table", "inet", "netapply") == before
    assert machine.run("journalctl", "-u", "netapply", "-o", "cat").count('"event": "healed"') == healed


def test_killed_and_restarted_its_table_has_the_same_owner_all_the_while(machine: Machine, figure: Any) -> None:
    """That it is the same proves that there was no moment without one: what lost its owner gets another."""
    file_owned(machine)
    before, said = rules(machine), complaints(machine)
    with connections(machine) as answers, watched(machine) as seen:
        for _ in range(2):
            pid = kill(machine)
            assert refuses(machine)
            machine.until(lambda pid=pid: restarted(machine, pid), "it did not come back")
            machine.systemctl("restart", "netapply.service")
            machine.systemctl("daemon-reexec")  # as an upgrade of systemd does
            assert refuses(machine)
    assert set(answers) == {"proxy"}, answers
    assert [table and table.flags for table in seen] == [OWNED], seen
    assert rules(machine) == before
    assert parked(machine) == 1
    change(machine, 15020)  # the heir may
    assert refuses(machine)
    assert complaints(machine) == said
    figure(f"owned, killed and restarted twice: {answers['proxy']} connections, none astray, the same owner")


def test_one_that_cannot_begin_leaves_it_its_owner(machine: Machine) -> None:
    file_owned(machine)
    machine.write(DROP_IN, "[Service]\nExecStart=\nExecStart=/bin/false\n")
    machine.systemctl("daemon-reload")
    with watched(machine) as seen:
        machine.systemctl("restart", "netapply.service", check=False)
        machine.until(lambda: int(machine.show("netapply.service", "NRestarts")["NRestarts"]) >= 2, "no tries")
        assert refuses(machine)
        machine.run("rm", DROP_IN)
        machine.systemctl("daemon-reload")
        machine.systemctl("restart", "netapply.service")
        assert states(machine) == {"pod": "inplace"}
    assert [table and table.flags for table in seen] == [OWNED], seen


def test_killed_at_any_moment_while_the_plan_changes_its_table_has_the_same_owner(
    machine: Machine, figure: Any
) -> None:
    """Whatever the dead left unread or half done on the socket, its heir goes on with it."""
    file_owned(machine)
    machine.write(DROP_IN, "[Service]\nRestartSec=0\n")
    machine.systemctl("daemon-reload")
    chance = random.Random(10)
    said = complaints(machine)
    with connections(machine) as answers, watched(machine) as seen:
        for port in range(15020, 15030):
            machine.write(FILE, excluding(port))
            time.sleep(chance.random() * 0.06)
            pid = kill(machine)
            machine.until(lambda pid=pid: restarted(machine, pid), "it did not come back")
            machine.until(lambda port=port: str(port) in "".join(rules(machine)), "the plan was not put in force")
    assert set(answers) == {"proxy"}, answers
    assert [table and table.flags for table in seen] == [OWNED], seen
    assert parked(machine) == 1
    figure(f"owned, killed 10 times while its plan changed: {answers['proxy']} connections, none astray")
    assert [each for each in complaints(machine) if each not in said and "an interrupted run" not in each] == []


@pytest.mark.parametrize("lost", ["by a stop", "as none is kept"])
def test_without_its_owner_it_outlasts_the_agent_and_the_next_one_adopts_it(machine: Machine, lost: str) -> None:
    if lost == "as none is kept":
        machine.write(DROP_IN, "[Service]\nFileDescriptorStoreMax=0\n")
        machine.systemctl("daemon-reload")
        machine.systemctl("stop", "netapply.service")
        machine.systemctl("start", "netapply.service")
        file_plan(machine)
    else:
        machine.write(DROP_IN, "[Service]\nFileDescriptorStorePreserve=no\n")  # which systemd has had from 254
        machine.systemctl("daemon-reload")
        file_owned(machine)
    before = rules(machine)
    with connections(machine) as answers, watched(machine) as seen:
        if lost == "by a stop":
            machine.systemctl("stop", "netapply.service")
            assert parked(machine) == 0
            assert rules(machine) == before
            machine.systemctl("start", "netapply.service")
        else:
            pid = kill(machine)
            machine.until(lambda: restarted(machine, pid), "it did not come back")
        assert states(machine) == {"pod": "inplace"}
    assert set(answers) == {"proxy"}, answers
    first, between, last = (table for table in seen if table)
    assert len(seen) == 3, seen
    assert (first.flags, between.flags, last.flags) == (OWNED, ORPHANED, OWNED)
    assert first.handle == between.handle == last.handle
    assert rules(machine) == before
    assert refuses(machine)


def test_without_the_flag_the_next_agent_leaves_it_to_anybody_and_goes_on_with_it(machine: Machine) -> None:
    file_owned(machine)
    before = rules(machine)
    machine.write(DROP_IN, f"[Service]\nExecStart=\nExecStart={PYTHON} -I -m netapply agent --read-group netapply\n")
    machine.systemctl("daemon-reload")
    with connections(machine) as answers, watched(machine) as seen:
        machine.systemctl("restart", "netapply.service")
        machine.until(lambda: parked(machine) == 0, "the owner is kept")
        assert rules(machine) == before
        change(machine, 15020)
    assert set(answers) == {"proxy"}, answers
    assert [table and table.flags for table in seen] == [OWNED, ORPHANED], seen
    in_pod(machine, "nft", "flush", "ruleset")
    machine.until(lambda: "table inet netapply" in in_pod(machine, "nft", "list", "ruleset"), "it was not healed")


@pytest.mark.parametrize("agent", ["runs", "is dead"])
def test_the_owner_keeps_no_namespace_alive_that_has_ended(machine: Machine, agent: str) -> None:
    brief(machine)
    if agent == "is dead":
        pid = kill(machine)
        machine.run("ip", "netns", "delete", "brief")
        machine.until(lambda: restarted(machine, pid), "it did not come back")
    else:
        machine.run("ip", "netns", "delete", "brief")
    machine.until(lambda: has_ended(machine), "it is kept alive")
    assert parked(machine) == 0


def test_after_a_restart_a_plan_can_go_and_come_back(machine: Machine) -> None:
    """What systemd kept is only good for the start: its numbers are others' by now."""
    file_owned(machine)
    machine.systemctl("restart", "netapply.service")
    machine.run("rm", FILE)
    machine.until(lambda: not states(machine), "the plan is still in force")
    assert in_pod(machine, "nft", "list", "tables") == ""
    file_owned(machine)
    assert refuses(machine)
