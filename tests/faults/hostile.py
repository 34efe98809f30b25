"""Applies while others change the same tables in a loop: `python -m tests.faults.hostile [--applies N]`.

iptables-legacy, iptables-nft, nft and another netapply write as fast as they can. Each of the stock tools adds rules
that stay and rules that go, and keeps a ledger of those that stay: in the end all of them must be there, with what
was there from the beginning, and ours.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import netapply
from netapply.backend import BUILT_IN
from netapply.errors import ApplyError, ConflictError, LockError
from netapply.planfile import read_plan
from tests import foreign, netns
from tests.faults import pictures, report
from tests.netns import Netns

#: Rules of each writer that stay.
STAYING = 200
_ADD = {
    "iptables-legacy": "iptables-legacy -w 5 -t nat -A DOCKER -p tcp --dport {} -j RETURN",
    "iptables-nft": "iptables-nft -t nat -A DOCKER -p tcp --dport {} -j RETURN",
    "nft": "nft add rule inet somebody input tcp dport {} drop",
}
_SHOW = {"iptables-legacy": "iptables-legacy-save", "iptables-nft": "iptables-nft-save", "nft": "nft list ruleset"}
_PASSING = {
    "iptables-legacy": ("iptables-legacy -w 5 -t nat -I OUTPUT -p udp --dport 7 -j ACCEPT",
                        "iptables-legacy -w 5 -t nat -D OUTPUT -p udp --dport 7 -j ACCEPT"),
    "iptables-nft": ("iptables-nft -t nat -I OUTPUT -p udp --dport 7 -j ACCEPT",
                     "iptables-nft -t nat -D OUTPUT -p udp --dport 7 -j ACCEPT"),
    "nft": ("nft add table ip passing", "nft delete table ip passing"),
}  # fmt: skip
_FIRST = 20000


class Told(NamedTuple):
    """What became of the applies of one dialect, and of everybody's rules."""

    backend: str
    applies: int
    changed: int
    #: Gave up, with the namespace as it was, as others changed the tables too often, or held the lock too long.
    conflicts: int
    #: Gave up, and something else stands.
    unrestored: int
    #: Changes that the stock tools made meanwhile, and applies of the other netapply.
    theirs: int
    foreign: int
    foreign_lost: int
    ours_missing: int
    #: Seconds that the slowest of the applies took.
    longest: float


class _Hung(BaseException):
    """An apply took longer than `netns.PATIENCE` seconds; no handler of the product's catches it."""


def write_for_ever(tool: str, ledger: Path) -> None:
    """One writer: what it is sure of stands in its ledger."""
    done: list[int] = []
    made = 0
    while True:
        if len(done) < STAYING:
            port = _FIRST + len(done)
            if not _run(_ADD[tool].format(port)):
                done.append(port)
                made += 1
        made += sum(not _run(command) for command in _PASSING[tool])
        _note(ledger, made, done)


def _note(ledger: Path, made: int, done: Sequence[int] = ()) -> None:
    """Whole or not at all, as the writer is ended in the middle of something."""
    new = ledger.with_suffix(".new")
    new.write_text(" ".join(map(str, (made, *done))))
    new.rename(ledger)


def _noted(ledger: Path) -> tuple[int, list[str]]:
    made, *ports = ledger.read_text().split() if ledger.exists() else ["0"]
    return int(made), ports


def _run(command: str) -> int:
    return subprocess.run(command.split(), check=False, capture_output=True, timeout=netns.PATIENCE).returncode


def apply_for_ever(path: str, plans: list[str], backend: str, ledger: Path) -> None:
    """Another netapply."""
    made = 0
    with netapply.open(path) as capture:
        for at in range(1 << 30):
            try:
                made += capture.apply(read_plan(plans[at % 2]), backend=backend).changed
                _note(ledger, made)
            except (ApplyError, ConflictError, LockError):
                continue


@contextmanager
def _others(work: dict[str, Callable[[], None]], place: _Place) -> Iterator[None]:
    pids: list[int] = []
    try:
        for each in work.values():
            pid = os.fork()
            if not pid:
                try:
                    place.enter_for_good()
                    each()
                finally:
                    os._exit(1)
            pids.append(pid)
        yield
    finally:
        for pid in pids:
            os.kill(pid, 15)
            os.waitpid(pid, 0)
        time.sleep(0.5)  # a tool that one of them had started ends by itself


def attacked(backend: str, applies: int, directory: Path) -> Told:
    """That many applies of one dialect in a namespace of its own, with everybody at work."""
    plans = []
    for name, text in (("a", ""), ("b", "outbound: {cidrs: {exclude: [10.1.0.0/16, 10.3.0.0/16]}}\n")):
        path = directory / f"{name}.yaml"
        path.write_text(f"apiVersion: netapply/v1\n{text}")
        plans.append(str(path))
    place = _Place(netns.make())
    foreign.put_up(place.netns, backend)
    if backend == "iptables-legacy":
        tools = ["iptables-legacy", "nft"]
    else:
        tools = ["iptables-nft", "nft"]
        place.netns.run("iptables-legacy", "-t", "nat", "-N", "DOCKER")
        tools.append("iptables-legacy")
    ledgers = {tool: directory / f"{backend}-{tool}" for tool in (*tools, "netapply")}
    work: dict[str, Callable[[], None]] = {tool: partial(write_for_ever, tool, ledgers[tool]) for tool in tools}
    work["netapply"] = lambda: apply_for_ever(place.netns.path, plans, backend, ledgers["netapply"])
    counts: Counter[str] = Counter()
    longest = 0.0
    with netapply.open(place.netns.path) as capture:
        untouched = pictures.take(capture.namespace)
    with _others(work, place), netapply.open(place.netns.path) as capture:
        loaded = [read_plan(path) for path in plans]
        for at in range(applies):
            begun = time.monotonic()
            try:
                with _bounded():
                    counts["changed"] += capture.apply(loaded[at % 2], backend=backend).changed
            except (ApplyError, ConflictError, LockError) as error:
                counts["unrestored"] += isinstance(error, ApplyError) and not error.restored
                counts["conflicts"] += 1
            longest = max(longest, time.monotonic() - begun)
    with netapply.open(place.netns.path) as capture:
        capture.recover()  # the other netapply was ended in the middle of something
        missing = min(len(capture.diff(plan, backend=backend).changes) for plan in loaded)
        capture.apply(loaded[0], backend=backend)
        missing += not capture.verify(loaded[0]).same
        lost = len(pictures.lost(untouched, pictures.take(capture.namespace), counters=False))
    total = theirs = 0
    for tool, ledger in ledgers.items():
        made, ports = _noted(ledger)
        shown = place.netns.run(*_SHOW[tool].split()) if ports else ""
        theirs += made
        total += len(ports)
        lost += sum(f"dport {port} " not in shown for port in ports)
    place.netns.close()
    conflicts, unrestored = counts["conflicts"], counts["unrestored"]
    return Told(backend, applies, counts["changed"], conflicts, unrestored, theirs, total, lost, missing, longest)


@contextmanager
def _bounded() -> Iterator[None]:
    def late(_number: int, _frame: object) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(netns.PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Place:
    """A namespace that a process can enter for good."""

    def __init__(self, place: Netns) -> None:
        self.netns = place

    def enter_for_good(self) -> None:
        from netapply import syscalls

        syscalls.setns(self.netns.fd)


_HEAD = (
    "| Dialect | Applies | Changed something | Gave up, as it was | Changes by others | Foreign rules "
    "| Foreign lost | Ours missing | Slowest |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
)


def _said(told: list[Told], seconds: float) -> str:
    rows = "".join(
        f"| {each.backend} | {each.applies} | {each.changed} | {each.conflicts} | {each.theirs} | {each.foreign} "
        f"| {each.foreign_lost} | {each.ours_missing} | {each.longest:.1f} s |\n"
        for each in told
    )
    return f"{_HEAD}{rows}\n{report.conditions('make hostile', seconds)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--applies", type=int, default=10_000)
    parser.add_argument("--write", type=Path, help="put the table into this document")
    arguments = parser.parse_args()
    told = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="netapply-hostile-") as name:
        directory = Path(name)
        os.environ["XTABLES_LOCKFILE"] = str(directory / "xtables.lock")
        os.environ["NETAPPLY_STATE_DIR"] = str(directory / "state")
        for backend in BUILT_IN:
            told.append(attacked(backend, arguments.applies // len(BUILT_IN) + 1, directory))
            print(told[-1], flush=True)
    if arguments.write:
        report.put(arguments.write, "hostile", _said(told, time.monotonic() - begun))
    return int(any(each.foreign_lost or each.ours_missing or each.unrestored for each in told))


if __name__ == "__main__":
    sys.exit(main())
