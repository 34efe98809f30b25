"""What the agent tells the service manager, and what it takes from it: sd_notify(3), sd_listen_fds(3), by hand."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from netapply.agent.manager import Manager, take_passed
from netapply.agent.model import Histogram, Metrics


class Systemd:
    """The manager's end: a socket that gathers what is told."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)
        self.fds: list[int] = []

    def told(self) -> list[list[str]]:
        messages: list[list[str]] = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            except BlockingIOError:
                return messages
            self.fds += fds
            messages.append(data.decode().splitlines())

    def close(self) -> None:
        self._socket.close()
        for fd in self.fds:
            os.close(fd)


class Double:
    """All that the manager looks at."""

    def __init__(self) -> None:
        self.ticked = 1.0
        self.kept: dict[str, int] = {}
        self.happened: asyncio.Queue[object] = asyncio.Queue()

    def metrics(self) -> Metrics:
        none = Histogram((), (0,), 0.0)
        states = {"inplace": 2, "failed": 1, "gone": 0}
        return Metrics(states, 0, 0, {}, none, none, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, self.ticked)

    def descriptors(self) -> dict[str, int]:
        return self.kept

    async def events(self) -> AsyncIterator[object]:
        while True:
            yield await self.happened.get()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    there = Systemd(tmp_path / "notify")
    yield there
    there.close()


async def test_ready_comes_with_a_status_and_the_watchdog_is_fed_by_ticks_alone(systemd: Systemd) -> None:
    agent = Double()
    manager = Manager({"NOTIFY_SOCKET": systemd.path, "WATCHDOG_USEC": "80000"}, {})
    assert manager.watchdog == 0.08
    manager.started(agent)  # type: ignore[arg-type]  # a double
    assert systemd.told() == [["READY=1", "STATUS=2 inplace, 1 failed"]]
    await asyncio.sleep(0.1)
    assert sum(message == ["WATCHDOG=1"] for message in systemd.told()) == 1
    await asyncio.sleep(0.1)
    assert systemd.told() == []  # the loop did not come round
    agent.ticked = 2.0
    await asyncio.sleep(0.05)
    assert systemd.told() == [["WATCHDOG=1"]]


async def test_descriptors_are_parked_when_something_was_applied_and_taken_back_when_they_went(
    systemd: Systemd,
) -> None:
    from netapply.agent.events import Applied

    agent, own = Double(), os.open("/proc/self/ns/net", os.O_RDONLY)
    manager = Manager({"NOTIFY_SOCKET": systemd.path}, {})
    manager.started(agent)  # type: ignore[arg-type]  # a double
    await asyncio.sleep(0)
    systemd.told()
    agent.kept["ns-4-1"] = own
    agent.happened.put_nowait(Applied("x", 0.0, "", "", True, 0.0))
    await asyncio.sleep(0.05)
    assert ["FDSTORE=1", "FDPOLL=0", "FDNAME=netns.ns-4-1"] in systemd.told()
    assert os.fstat(systemd.fds[0]).st_ino == os.fstat(own).st_ino
    agent.kept.clear()
    agent.happened.put_nowait(Applied("x", 0.0, "", "", True, 0.0))
    await asyncio.sleep(0.05)
    assert systemd.told() == [["FDSTOREREMOVE=1", "FDNAME=netns.ns-4-1"]]
    os.close(own)


async def test_what_was_parked_before_is_closed_once_the_agent_has_its_own(systemd: Systemd) -> None:
    passed, own = (os.open("/dev/null", os.O_RDONLY) for _ in range(2))
    agent = Double()
    agent.kept["ns-4-1"] = own
    Manager({"NOTIFY_SOCKET": systemd.path}, {"ns-4-1": passed}).started(agent)  # type: ignore[arg-type]  # a double
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(passed)
    assert systemd.told() == [["READY=1", "STATUS=2 inplace, 1 failed"]]  # it is parked already
    os.close(own)


async def test_without_a_manager_nothing_is_told() -> None:
    manager = Manager({}, {})
    manager.started(Double())  # type: ignore[arg-type]  # a double
    manager.tell("READY=1")
    assert manager.watchdog == 0.0


def test_a_manager_that_has_gone_is_no_error(tmp_path: Path) -> None:
    Manager({"NOTIFY_SOCKET": str(tmp_path / "none")}, {}).tell("READY=1")


def test_somebody_elses_variables_are_not_taken() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "control:read", "KEPT": "x"}
    assert take_passed(environment) == ({}, {})
    assert environment == {"KEPT": "x"}
    assert Manager({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, {}).watchdog == 0.0


PASS = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX); sock.bind(sys.argv[1]); sock.listen()
ends = [os.open(path, os.O_RDONLY) for path in ("/proc/self/ns/net", "/dev/null")]
for at, fd in enumerate((sock.fileno(), *ends)):
    os.dup2(fd, 60 + at)
for at in range(3):
    os.dup2(60 + at, 3 + at, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="3", LISTEN_FDNAMES="control:netns.ns-4-7:odd")
from netapply.agent.manager import take_passed
passed = take_passed(os.environ)
print(list(passed.sockets), passed.sockets["control"].getsockname(), dict(passed.namespaces))
print(os.get_inheritable(3), os.get_inheritable(4), "LISTEN_FDS" in os.environ)
try:
    os.fstat(5)
except OSError:
    print("closed")
"""


def test_sockets_and_namespaces_are_taken_by_their_names_and_others_closed(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    done = subprocess.run([sys.executable, "-c", PASS, path], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"['control'] {path} {{'ns-4-7': 4}}", "False False False", "closed"], (
        done.stderr
    )


CONFINED = """
import subprocess, threading
from netapply.agent.confine import deny_programs
print(repr(deny_programs()))
def attempt():
    try:
        subprocess.run(["/bin/true"])
    except PermissionError:
        print("refused")
attempt()
thread = threading.Thread(target=attempt); thread.start(); thread.join()
"""


def test_a_service_that_gave_it_up_runs_no_program_from_any_thread() -> None:
    done = subprocess.run([sys.executable, "-c", CONFINED], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["''", "refused", "refused"], done.stderr
