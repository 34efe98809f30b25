"""`apply --confirm` without the agent: back by itself unless somebody confirms, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import netapply
from netapply import trial
from netapply.api import Capture
from netapply.backend import BUILT_IN
from netapply.plan import CapturePlan
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


@pytest.mark.parametrize(
    ("name", "port", "said"),
    [("c", 17001, "effective: yes"), ("b", 16001, "not any more")],
    ids=["another", "the same"],
)
def test_who_applies_something_for_good_ends_the_trial(
    netns: Netns, tmp_path: Path, name: str, port: int, said: str
) -> None:
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), netns=netns)
        run("apply", plan(tmp_path, "b", 16001), "--confirm", "3", netns=netns)
        done = run("apply", plan(tmp_path, name, port), netns=netns)
        assert said in done.stdout + done.stderr
        assert run("confirm", netns=netns).returncode == 1
        time.sleep(4.5)
        assert ports(capture) == {port}


def test_what_stands_already_is_not_on_trial(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), netns=netns)
        done = run("apply", plan(tmp_path, "a", 15001), "--confirm", "1", netns=netns)
        assert "nothing is on trial" in done.stdout + done.stderr
        time.sleep(2)
        assert ports(capture) == {15001}


def test_who_tries_again_what_is_on_trial_gives_it_more_time(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), netns=netns)
        run("apply", plan(tmp_path, "b", 16001), "--confirm", "3", netns=netns)
        done = run("apply", plan(tmp_path, "b", 16001), "--confirm", "60", netns=netns)
        assert "on trial for 60 s" in done.stdout + done.stderr
        time.sleep(4.5)
        assert ports(capture) == {16001}
        assert run("extend", "0.1", netns=netns).returncode == 0
        until(capture, {15001})


def test_of_two_trials_that_nobody_confirms_none_is_left(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), netns=netns)
        run("apply", plan(tmp_path, "b", 16001), "--confirm", "60", netns=netns)
        run("apply", plan(tmp_path, "c", 17001), "--confirm", "1", netns=netns)
        until(capture, {15001})
        time.sleep(1)
        assert ports(capture) == {15001}
        assert run("confirm", netns=netns).returncode == 1


def test_what_is_applied_after_a_clean_is_not_on_trial(netns: Netns, tmp_path: Path) -> None:
    """Numbers begin anew then; the waiter looks four times a second, and two commands are through in less."""
    with netapply.open(netns.path) as capture:
        run("apply", plan(tmp_path, "a", 15001), "--confirm", "2", netns=netns)
        capture.clean()
        capture.apply(CapturePlan())
        time.sleep(3.5)
        assert capture.verify().same


@pytest.mark.parametrize("words", [("apply", "PLAN", "--confirm", "0"), ("extend", "0")])
def test_no_time_at_all_is_refused(netns: Netns, tmp_path: Path, words: tuple[str, ...]) -> None:
    here = plan(tmp_path, "a", 15001)
    done = run(*(here if word == "PLAN" else word for word in words), netns=netns)
    assert done.returncode == 1
    assert "is not a number of seconds" in done.stderr
    with netapply.open(netns.path) as capture:
        assert ports(capture) == set()


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


def test_the_time_is_that_since_the_machine_started(netns: Netns, tmp_path: Path) -> None:
    """In a time namespace where the machine has run longer by a day, and no other clock has moved."""
    day, state = 86400, tmp_path / "state"
    words = ["unshare", "--time", "--fork", "--boottime", str(day)]
    if subprocess.run([*words, "true"], timeout=30, check=False, capture_output=True).returncode:
        pytest.skip("this kernel has no time namespaces, or we may not make one")
    words += [*COMMAND, "apply", plan(tmp_path, "a", 15001), "--confirm", "4", "--state-dir", str(state)]
    with netapply.open(netns.path, state_directory=str(state)) as capture:
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        done = subprocess.run([*words, "-N", netns.path], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        (file,) = state.glob("*.trial")
        ends = json.loads(file.read_text())["until"]
        assert before + day + 4 <= ends <= time.clock_gettime(time.CLOCK_BOOTTIME) + day + 4
        left = ends - day - time.clock_gettime(time.CLOCK_BOOTTIME)
        assert left - 0.2 < until(capture, set()) < left + 15


def test_it_goes_back_when_the_terminal_is_hung_up(netns: Netns, tmp_path: Path) -> None:
    """The other end of the caller's controlling terminal is closed, as when a connection breaks: SIGHUP, then EIO."""
    script = f"{' '.join(COMMAND)} apply {plan(tmp_path, 'a', 15001)} --confirm 3 -N {netns.path}; sleep 60"
    with netapply.open(netns.path) as capture:
        shell, terminal = pty.fork()
        if not shell:
            os.execv("/bin/sh", ["sh", "-c", script])
        try:
            until(capture, {15001})
            time.sleep(0.5)
        finally:
            os.close(terminal)
            assert os.waitstatus_to_exitcode(os.waitpid(shell, 0)[1]) == -signal.SIGHUP
        assert ports(capture) == {15001}
        until(capture, set())


@pytest.mark.parametrize("request_", ["confirm", "extend"])
def test_of_a_request_and_the_end_of_the_time_exactly_one_is_first(
    netns: Netns, tmp_path: Path, request_: str, figure: Callable[[str], None]
) -> None:
    """Both come at once, from threads that have the namespace open each: who is second is told."""
    asked = {"confirm": trial.confirm, "extend": lambda capture: trial.extend(capture, 60)}[request_]
    state, tries, first = str(tmp_path / "state"), 60, 0
    with (
        netapply.open(netns.path, state_directory=state) as one,
        netapply.open(netns.path, state_directory=state) as two,
    ):
        one.apply(CapturePlan())
        for at in range(tries):
            with trial._files(one) as files:
                assert files.load() is not None
                number = files.number
                trial._write(files, one, trial.Trial(number, trial._now(), number - 1))
            barrier = threading.Barrier(2)

            def ask(at: int = at, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                time.sleep(0.0004 * (at % 3))  # else the same thread is always first
                return asked(one)

            def end(barrier: threading.Barrier = barrier, number: int = number) -> bool:
                barrier.wait()
                time.sleep(0.0004)
                try:
                    return trial._is_over(two, number)
                except trial._Ended:
                    return False

            with ThreadPoolExecutor(2) as pool:
                was_asked, is_over = (pool.submit(work) for work in (ask, end))
                assert was_asked.result(20) is not is_over.result(20)
                first += was_asked.result()
    figure(f"{tries} at once: {first} were asked first, {tries - first} were over")
    assert 0 < first < tries
