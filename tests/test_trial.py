"""`apply --confirm` without the agent: back by itself unless somebody confirms, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import netapply
from netapply.api import Capture
from netapply.backend import BUILT_IN
from tests.netns import Netns

COMMAND = [sys.executable, "-m", "netapply"]


def run(*words: str, netns: Netns) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words, "-N", netns.path], capture_output=True, text=True, timeout=60, check=False)


def plan(place: Path, name: str, port: int) -> str:
    (place / name).write_text(json.dumps({"apiVersion": "netapply/v1", "proxy": {"outbound_port": port}}))
    return str(place / name)


def ports(capture: Capture) -> set[int]:
    return {port for port in (15001, 16001, 17001) if any(str(port) in each.rule for each in capture.show())}


def until(capture: Capture, wanted: set[int], patience: float = 20.0) -> float:
    begun = time.monotonic()
    while ports(capture) != wanted:
        assert time.monotonic() < begun + patience, ports(capture)
        time.sleep(0.05)
    return time.monotonic() - begun


@pytest.mark.parametrize("backend", tuple(BUILT_IN))
def test_what_nobody_confirms_goes_back(netns: Netns, tmp_path: Path, backend: str) -> None:
    with netapply.open(netns.path) as capture:
        done = run("apply", plan(tmp_path, "a", 15001), "--backend", backend, netns=netns)
        assert done.returncode == 0, done.stderr
        done = run("apply", plan(tmp_path, "b", 16001), "--confirm", "2", netns=netns)
        assert done.returncode == 0, done.stderr
        assert "on trial for 2 s" in done.stdout + done.stderr
        assert ports(capture) == {16001}
        assert 0.5 < until(capture, {15001}) < 15
        assert capture.verify().same
        done = run("confirm", netns=netns)
        assert done.returncode == 1
        assert "nothing is on trial" in done.stderr


def test_a_first_apply_goes_back_to_nothing(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path) as capture:
        assert run("apply", plan(tmp_path, "a", 15001), "--confirm", "1", netns=netns).returncode == 0
        until(capture, set())


def test_what_is_confirmed_stays(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), netns=netns)
        run("apply", plan(tmp_path, "b", 16001), "--confirm", "2", netns=netns)
        assert run("confirm", netns=netns).returncode == 0
        time.sleep(3.5)
        assert ports(capture) == {16001}


def test_more_time_is_given(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), "--confirm", "3", netns=netns)
        assert run("extend", "60", netns=netns).returncode == 0
        time.sleep(4)
        assert ports(capture) == {15001}
        assert run("extend", "0.5", netns=netns).returncode == 0
        until(capture, set())


def test_who_applies_something_else_ends_the_trial(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), netns=netns)
        run("apply", plan(tmp_path, "b", 16001), "--confirm", "2", netns=netns)
        run("apply", plan(tmp_path, "c", 17001), netns=netns)
        assert run("confirm", netns=netns).returncode == 1
        time.sleep(3.5)
        assert ports(capture) == {17001}


def test_what_stands_already_is_not_on_trial(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), netns=netns)
        done = run("apply", plan(tmp_path, "a", 15001), "--confirm", "1", netns=netns)
        assert "nothing is on trial" in done.stdout + done.stderr
        time.sleep(2)
        assert ports(capture) == {15001}


def test_it_goes_back_when_the_terminal_ends(netns: Netns, tmp_path: Path) -> None:
    """The caller's whole session is hung up and killed; the waiter is in another."""
    name = plan(tmp_path, "a", 15001)
    script = f"{' '.join(COMMAND)} apply {name} --confirm 3 -N {netns.path}; sleep 60"
    with netapply.open(netns.path) as capture:
        shell = subprocess.Popen(["sh", "-c", script], start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            until(capture, {15001})
            time.sleep(0.5)
        finally:
            os.killpg(shell.pid, signal.SIGHUP)
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait(10)
        assert ports(capture) == {15001}
        until(capture, set())


_DIE = """
import os, signal, sys
from netapply import trial
from netapply.cli import main
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
trial.Waiter.wait = die
main(sys.argv[1:])
"""


def test_who_dies_after_the_change_has_confirmed_nothing(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), netns=netns)
        words = [sys.executable, "-c", _DIE, "apply", plan(tmp_path, "b", 16001), "--confirm", "60", "-N", netns.path]
        assert subprocess.run(words, timeout=60, check=False, capture_output=True).returncode == -signal.SIGKILL
        until(capture, {15001})
