"""What stands after a run that failed or died, and whether the journal says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import netapply
from netapply import recovery
from netapply.backend import BUILT_IN, OURS, find_backend
from netapply.errors import ApplyError, NetapplyError
from netapply.journal import NOWHERE, Entry, Files, Journal, State
from netapply.namespace import Namespace
from netapply.plan import CapturePlan
from netapply.planfile import fingerprint, read_plan
from netapply.ruleset import Routing, Sysctl
from netapply.transaction import Transaction
from tests.faults.stage import MODES, Case, Stage, warm
from tests.faults.tracing import CALLS, Call, Child, Fault, Kill, require
from tests.netns import Netns

TTL = "net.ipv4.ip_default_ttl"
A = CapturePlan()
B = CapturePlan(ipv6="skip")


def ttl(value: str) -> State:
    return State(None, Routing(sysctls=(Sysctl(TTL, value),)))


# --- settings --------------------------------------------------------------------------------------------------


@pytest.fixture
def namespace(netns: Netns) -> Iterator[Namespace]:
    with Namespace.open(netns.path) as opened:
        yield opened


@contextmanager
def acquired(namespace: Namespace, state: Path) -> Iterator[tuple[Files, Entry | None]]:
    files = Journal(str(state)).acquire(namespace.identity, 5)
    try:
        yield files, files.load()
    finally:
        files.close()


def bring(namespace: Namespace, state: Path, desired: State, proof: Callable[[], None] | None = None) -> None:
    with acquired(namespace, state) as (files, entry):
        known = entry.created if entry else Routing()
        transaction = Transaction(namespace, find_backend("nftables"), OURS, files, proof=proof)
        transaction.run(Entry(True, "nftables", NOWHERE, desired, known), entry)


def refuse() -> None:
    raise NetapplyError("refused")


def die() -> None:
    os._exit(9)


def in_a_process_that_dies(work: Callable[[], None]) -> None:
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("then", [ttl("90"), NOWHERE], ids=["changed", "set back"])
@pytest.mark.parametrize("dies", [False, True], ids=["fails", "dies"])
def test_a_setting_is_undone_to_what_it_was_before_this_run_and_cleaned_to_what_it_was_before_the_first(
    namespace: Namespace, tmp_path: Path, then: State, dies: bool
) -> None:
    def now() -> str:
        return namespace.read_file("sys/net/ipv4/ip_default_ttl").strip()

    state = tmp_path / "state"
    first = now()
    bring(namespace, state, ttl("80"))
    if dies:
        in_a_process_that_dies(lambda: bring(namespace, state, then, die))
        with acquired(namespace, state) as (files, entry):
            assert entry is not None
            files.begin(entry._replace(desired=ttl("100")))  # else it is found finished
        recovery.recover(namespace, journal=Journal(str(state)))
    else:
        with pytest.raises(ApplyError):
            bring(namespace, state, then, refuse)
    assert now() == "80"
    bring(namespace, state, NOWHERE)
    assert now() == first


# --- the journal after a death -----------------------------------------------------------------------------------

#: What a run changes outside of itself, from the moment at which its journal says that it has begun.
_CHANGING = frozenset(
    CALLS[name] for name in ("sendto", "sendmsg", "setsockopt", "rename", "renameat", "link", "linkat", "unlink",
                             "unlinkat", "fsync", "write")
)  # fmt: skip


class _FromTheBeginning(Fault):
    """Notes the calls that change something, from the first rename on, and the one after the last."""

    curious = True

    def __init__(self) -> None:
        self.places: list[int] = []

    def entering(self, child: Child, call: Call) -> int:
        begun = self.places or call.number in (CALLS["rename"], CALLS["renameat"])
        if begun and call.number in _CHANGING:
            self.places.append(call.place)
        return 0


ALL = os.environ.get("NETAPPLY_KILLS") == "all"
#: How many of them a run is killed at, in turn, unless at all.
KILLS = 4
COMMANDS = {
    "apply": ("apply a", ("clean",)),
    "update": ("apply b", ("clean", "apply a")),
    "clean": ("clean", ("apply a",)),
    "rollback": ("rollback", ("clean", "apply b", "apply a")),
}


@pytest.mark.parametrize(
    ("command", "mode"),
    [(command, mode) for mode in MODES for command in COMMANDS if ALL or mode == "redirect" or command == "update"],
)
@pytest.mark.parametrize("backend", BUILT_IN)
def test_whoever_dies_when_the_journal_says_what_stands_after_recovery(
    backend: str, command: str, mode: str, figure: Callable[[str], None]
) -> None:
    """The rules by `verify`, and the plan by its fingerprint; and a rollback goes back to what stood before."""
    require()
    stage = Stage(Case(backend, mode, "IPv4 and IPv6"))
    words, before = COMMANDS[command]
    try:
        warm(stage)
        stage.reset(*before)
        begun = _told(stage)
        watch = _FromTheBeginning()
        assert stage.fail(words, watch).code == 0
        ended = _told(stage)
        assert begun != ended
        killed = finished = 0
        for at in spread(watch.places):
            stage.reset(*before)
            assert _told(stage) == begun
            fault = Kill(at)
            stage.fail(words, fault)
            if not fault.hit:  # this time it was done in fewer
                continue
            killed += 1
            assert stage.run("recover").code == 0
            found = _told(stage)
            assert found in (begun, ended), at
            finished += found == ended
            stands = stage.picture().state
            assert stage.run("verify").code == (0 if found[1] else 1), at
            assert stage.run("apply a" if found[1] == _marks(stage)["a"] else "apply b").code == 0
            if found[1]:
                assert stage.picture().state == stands, at
        figure(f"{killed} kills, {finished} found finished, each time the journal said what stood")
        assert killed > 3
    finally:
        stage.close()


def _marks(stage: Stage) -> dict[str, str]:
    return {name: fingerprint(read_plan(path)) for name, path in zip("ab", stage.plans, strict=True)}


def spread(places: list[int]) -> list[int]:
    """All of them if NETAPPLY_KILLS says "all", or some that lie evenly."""
    return places if ALL else [places[at * len(places) // KILLS] for at in range(KILLS)]


def _told(stage: Stage) -> tuple[bool, str]:
    """What the journal says: whether anything of ours stands, and by which plan."""
    with acquired(stage.namespace, stage.state) as (_, entry):
        if entry is None or entry.desired == NOWHERE:
            return False, ""
        assert not entry.pending
        return True, entry.fingerprint


def test_a_plan_that_stands_already_is_in_the_journal_whoever_put_it_there(netns: Netns, tmp_path: Path) -> None:
    """Also where the caller gives plans no names: they are told apart by what they are."""
    with netapply.open(netns.path, state_directory=str(tmp_path / "one")) as capture:
        capture.apply(A)
    with netapply.open(netns.path, state_directory=str(tmp_path / "other")) as elsewhere:
        elsewhere.apply(B)
    with netapply.open(netns.path, state_directory=str(tmp_path / "one")) as capture:
        assert not capture.verify().same
        assert not capture.apply(B).changed
        assert capture.verify().same


@pytest.mark.parametrize("error", [NetapplyError("refused"), KeyboardInterrupt()])
def test_what_fails_after_the_journal_was_settled_is_undone_and_unsaid(
    netns: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    settle = Files.settle

    def interrupted(files: Files, entry: Entry) -> None:
        settle(files, entry)
        raise error

    with netapply.open(netns.path, state_directory=str(tmp_path)) as capture:
        capture.apply(A, fingerprint="a")
        with monkeypatch.context() as patch:
            patch.setattr(Files, "settle", interrupted)
            with pytest.raises((ApplyError, KeyboardInterrupt)):
                capture.apply(B, fingerprint="b")
        assert capture.verify().same
        assert capture.verify(A).same
        with acquired(capture.namespace, tmp_path) as (_, entry):
            assert entry is not None
            assert (entry.fingerprint, entry.pending) == ("a", False)
        capture.apply(B)
        capture.rollback()
        assert capture.verify(A).same
