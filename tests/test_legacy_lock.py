"""The xtables lock: taken for the commit alone, with a deadline, and honest about who holds it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netapply.errors import LockError
from netapply.namespace import Namespace
from netapply.ruleset import Base, Chain, Jump, Return, Rule, Ruleset, Table
from netapply_iptables_legacy import BACKEND
from netapply_wire.xtables_lock import XtablesLock
from tests.netns import Netns

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def desired() -> Ruleset:
    jump = Chain("OUTPUT", base=Base("filter", "output", 0), head=(Rule((), Jump("NETAPPLY_X")),))
    return Ruleset((Table("ip", "filter", (jump, Chain("NETAPPLY_X", (Rule((), Return()),)))),))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    return tmp_path / "lock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate(timeout=10)


def test_giving_up_names_the_holder(netns: Netns, holder: subprocess.Popen[str]) -> None:
    """At the deadline, with nothing changed; reading needs no lock."""
    with Namespace.open(netns.path, lock_timeout=0.1) as kernel:
        (step,) = BACKEND.encode(BACKEND.read(kernel), desired())
        begun = time.monotonic()
        with pytest.raises(LockError, match=rf"python\S* \({holder.pid}\)"):
            BACKEND.commit(kernel, step)
        assert 0.1 <= time.monotonic() - begun < 2
        assert kernel.read_file("net/ip_tables_names") == ""


def test_a_lock_that_comes_free_in_time_is_taken(netns: Netns, holder: subprocess.Popen[str]) -> None:
    with Namespace.open(netns.path, lock_timeout=10) as kernel:
        (step,) = BACKEND.encode(BACKEND.read(kernel), desired())
        assert holder.stdin is not None
        timer = threading.Timer(0.1, holder.stdin.close)
        timer.start()
        BACKEND.commit(kernel, step)
        timer.join()
        assert BACKEND.detect(kernel)
        holder.stdin = None


def test_two_threads_of_one_process_exclude_each_other(path: Path) -> None:
    with XtablesLock(0), pytest.raises(LockError), XtablesLock(0.01):
        pass
    with XtablesLock(0):
        pass


def test_iptables_waits_for_us(netns: Netns, path: Path) -> None:
    with XtablesLock(0):
        assert (
            "Another app"
            in subprocess.run(
                ["nsenter", f"--net={netns.path}", "iptables-legacy", "-w", "1", "-A", "OUTPUT", "-j", "ACCEPT"],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            ).stderr
        )


def test_the_lock_file_is_made_for_its_owner_alone(path: Path) -> None:
    with XtablesLock(0):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_lock_held_by_nobody_visible_is_still_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from netapply_wire import xtables_lock

    def unreadable(_: str) -> str:
        raise PermissionError

    monkeypatch.setattr(xtables_lock, "_read", unreadable)
    fd = os.open(path, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(LockError, match="cannot be seen"), XtablesLock(0):
        pass
    os.close(fd)


@pytest.mark.parametrize("kind", ["directory", "symbolic link", "nowhere"])
def test_what_is_no_lock_file_is_refused_clearly(path: Path, kind: str) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "symbolic link":
        path.symlink_to("/dev/null")
    else:
        os.environ["XTABLES_LOCKFILE"] = str(path / "below")
        path.write_text("")
    with pytest.raises(LockError, match=kind if kind != "nowhere" else "cannot be opened"), XtablesLock(0):
        pass
