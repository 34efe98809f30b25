"""The short form of `make faults`: a sample of each class in each dialect; and recover, rollback and history."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from itertools import chain
from pathlib import Path

import pytest

import netapply
from netapply import history
from netapply.backend import BUILT_IN
from netapply.errors import ApplyError, ConflictError, NetapplyError
from netapply.journal import KEPT, Entry, Files, Journal
from netapply.plan import CapturePlan
from netapply.testing import FakeKernel
from netapply.transaction import Transaction
from tests.faults import answers, circumstances, hostile, kills, refusals, report, soak, tracing
from tests.faults.kills import Interrupt, interruption
from tests.faults.outcome import Outcome, Sum, summed
from tests.faults.stage import MODES, Case, Stage, warm
from tests.faults.tracing import Ended, Fault
from tests.netns import Netns

BACKENDS = tuple(BUILT_IN)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    tracing.require()
    for backend in BACKENDS:
        stage = Stage(Case(backend, "tproxy", "IPv4"))
        warm(stage)
        stage.close()


def sample(outcomes: Iterator[Outcome]) -> int:
    """How many there were, none of them wrong."""
    found = [*outcomes]
    wrong = [f"{each.where}: {line}" for each in found for line in each.wrong]
    assert not wrong, "\n".join(wrong)
    assert found
    return len(found)


def case_of(backend: str, number: int) -> Case:
    """One of the two modes, by turns."""
    return Case(backend, MODES[(BACKENDS.index(backend) + number) % 2], "IPv4 and IPv6")


@each_backend
@pytest.mark.parametrize("operation", kills.OPERATIONS, ids=lambda operation: operation.name)
def test_killed_at_a_system_call_the_next_command_makes_it_old_or_new(
    backend: str, operation: kills.Operation, figure: Callable[[str], None]
) -> None:
    """A sample of the system calls of each command; `make faults` takes all."""
    case = case_of(backend, kills.OPERATIONS.index(operation))
    figure(f"{sample(kills.kill_some(case, operation, most=4))} kill points")


@each_backend
@pytest.mark.parametrize("step", [1, 2])
def test_a_migration_killed_at_a_system_call_ends_in_one_dialect_or_the_other(
    backend: str, step: int, figure: Callable[[str], None]
) -> None:
    case = case_of(backend, step)._replace(target=BACKENDS[(BACKENDS.index(backend) + step) % 3])
    count = sample(kills.kill_some(case, kills.MIGRATE, most=5))
    figure(f"{count + sample(kills.kill_some(case, kills.RECOVER_MIGRATE, most=2))} kill points")


@each_backend
@pytest.mark.parametrize("number", range(len(refusals.REFUSALS)), ids=lambda at: refusals.REFUSALS[at].name)
def test_where_a_system_call_fails_it_is_told_and_old_or_new_stands(backend: str, number: int) -> None:
    operation = refusals.SPOILED[number % 3]
    refusal = refusals.REFUSALS[number]
    sample(refusals.refuse_everywhere(case_of(backend, number), refusal, most=2, operations=(operation,)))


@each_backend
@pytest.mark.parametrize("name", ["EPERM", "an I/O error", "a full disk"])
def test_clean_removes_all_or_tells_why_not(backend: str, name: str) -> None:
    """Where it may not look is not empty; and a journal that stays is told, when the rules are gone."""
    (refusal,) = (each for each in refusals.REFUSALS if each.name == name)
    clean = refusals.SPOILED[2:]
    sample(refusals.refuse_everywhere(case_of(backend, 1), refusal, most=12, operations=clean))


@each_backend
@pytest.mark.parametrize("name", answers.ANSWERS)
def test_where_an_answer_is_spoiled_it_is_told_and_old_or_new_stands(backend: str, name: str) -> None:
    number = [*answers.ANSWERS].index(name)
    operation = refusals.SPOILED[number % 3]
    sample(answers.answer_everywhere(case_of(backend, number), name, most=2, operations=(operation,)))


def test_routing_is_changed_whatever_strangers_send() -> None:
    """Rules and routes are pyroute2's, and its sockets hear anybody unless they are told not to."""
    case = Case("nftables", "tproxy", "IPv4 and IPv6")
    found = [*answers.answer_everywhere(case, "a forger that never ends", most=8, operations=refusals.SPOILED[:1])]
    assert [each.state for each in found if not each.wrong] == ["new"] * len(found)


@each_backend
@pytest.mark.parametrize(
    "work",
    [answers.writers, partial(circumstances.torn, most=2), circumstances.locked, circumstances.jumped],
    ids=["another writer", "a torn journal", "a lock held for ever", "a clock jump"],
)
def test_in_bad_circumstances_old_or_new_stands(backend: str, work: Callable[[Case], Iterator[Outcome]]) -> None:
    sample(work(case_of(backend, 0)))


@each_backend
def test_a_namespace_deleted_or_replaced_in_mid_apply_and_the_other_is_never_touched(backend: str) -> None:
    sample(circumstances.replaced(case_of(backend, 1), most=3))


@each_backend
def test_rules_of_writers_who_never_end_all_stand_in_the_end(
    backend: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    told = hostile.attacked(backend, 60, tmp_path)
    figure(str(told))
    assert (told.foreign_lost, told.ours_missing) == (0, 0)


def test_namespaces_that_come_and_go_leave_nothing_in_the_process() -> None:
    assert not soak.faults(soak.soak(20))


def test_the_rig_sees_what_is_lost() -> None:
    """A rule of somebody else's that goes, and a state that is neither."""
    stage = Stage(Case("nftables", "redirect", "IPv4"))
    try:
        old = stage.reset("apply a")
        stage.netns.run("nft", "flush", "chain", "inet", "netapply", "nat-outbound")
        stage.netns.run("nft", "flush", "chain", "inet", "somebody", "input")
        ended = tracing.Ended(0, "", 0)
        outcome = refusals.judge(stage, "none", "nowhere", ended, old, old)
        assert outcome.state == ""
        assert any("somebody" in line for line in outcome.wrong)
    finally:
        stage.close()


TOLD = "netapply: apply: EPERM"


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(0, "", 0), "said to be done, and is old"),
        (Ended(1, "", 0), "no error was told"),
        (Ended(1, f"{TOLD}\nTraceback (most recent call last)", 0), "ended with 1"),
        (Ended(3, TOLD, 0), "ended with 3"),
        (Ended(-11, TOLD, 0), "ended with -11"),
        (Ended(1, TOLD, 25), "took 25 s"),
    ],
)
def test_the_rig_notices_how_a_command_ends(ended: Ended, fault: str) -> None:
    stage = Stage(Case("nftables", "redirect", "IPv4"))
    try:
        new = stage.reset("apply b")
        old = stage.reset("apply a")
        assert not refusals.judge(stage, "none", "nowhere", Ended(1, TOLD, 0), old, new).wrong
        (line,) = refusals.judge(stage, "none", "nowhere", ended, old, new).wrong
        assert fault in line
    finally:
        stage.close()


def _without_ip6(transaction: Transaction, restore: Callable[[Transaction, Entry], str], entry: Entry) -> str:
    """What is gone back to has the tables of IPv6 that were to come."""
    assert entry.before.ruleset
    assert entry.desired.ruleset
    tables = [table for table in entry.before.ruleset.tables if table.family == "ip"]
    tables += [table for table in entry.desired.ruleset.tables if table.family == "ip6"]
    ruleset = entry.before.ruleset._replace(tables=tuple(tables))
    return restore(transaction, entry._replace(before=entry.before._replace(ruleset=ruleset)))


def _nothing(*_arguments: object) -> None: ...


def _as_if_restored(_self: Transaction, _start: object, _known: object, _undone: object, error: Exception) -> None:
    raise ApplyError("commit", error, restored=True)


LEGACY = Case("iptables-legacy", "tproxy", "IPv4 and IPv6")
BROKEN = {
    "no journal is written": (Files, "begin", _nothing),
    "the journal stays as it is": (Files, "discard", _nothing),
    "IPv6 does not go back": (Transaction, "restore", partialmethod(_without_ip6, Transaction.restore)),
    "nothing goes back": (Transaction, "_undo", _as_if_restored),
    "nothing is read back": (Transaction, "_prove", _nothing),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_rig_notices_a_product_that_is_broken(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[broken])
    tried = chain(
        answers.answer_everywhere(LEGACY, "the kernel says EPERM", most=6),
        answers.answer_everywhere(LEGACY, "the kernel says done, and did nothing", most=6),
        kills.kill_some(LEGACY, kills.OPERATIONS[1], most=30),
        kills.kill_some(LEGACY._replace(mode="redirect"), kills.OPERATIONS[0], most=30),
    )
    assert any(each.wrong for each in tried)


def test_the_soak_notices_what_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netapply.namespace.close_later", _nothing)
    assert any("descriptors" in line for line in soak.faults(soak.soak(20)))


def test_the_hostile_run_notices_a_rule_of_theirs_that_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settle = Transaction._settle

    def careless(transaction: Transaction, entry: Entry) -> None:
        settle(transaction, entry)
        flush = ["nft", "flush", "chain", "inet", "somebody", "input"]
        transaction._namespace.inside(lambda: subprocess.run(flush, check=True))

    monkeypatch.setattr(Transaction, "_settle", careless)
    assert hostile.attacked("nftables", 10, tmp_path).foreign_lost


def test_the_table_sums_up_what_was_tried(tmp_path: Path) -> None:
    outcomes = [
        Outcome("a fault", "nftables", "", "between", "old"),
        Outcome("a fault", "nftables", "", "new", "new"),
        Outcome("a fault", "nftables", "", "new", "", ("lost",)),
        Outcome("a fault", "iptables-legacy", "", "new", "new"),
    ]
    assert summed(outcomes)["a fault", "nftables"] == Sum(3, 1, 1, 1, 1, 0)
    assert "| a fault | 4 | 1 / 1 / 1 |  | 0 / 1 / 0 | 1 | 1 |" in report.table(summed(outcomes))
    assert "| **all** | 4 | 1 / 1 / 1 | 0 / 0 / 0 | 0 / 1 / 0 | 1 | 1 |" in report.table(summed(outcomes))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
    report.put(page, "x", "new\n")
    assert page.read_text() == "before\n<!-- x: begin -->\nnew\n<!-- x: end -->\nafter\n"
    with pytest.raises(ValueError, match="no place for y"):
        report.put(page, "y", "")


def test_recover_finishes_or_undoes_and_says_which() -> None:
    stage = Stage(Case("iptables-legacy", "tproxy", "IPv4 and IPv6"))
    try:
        old = stage.reset("apply a")
        assert "nothing was interrupted" in stage.run("recover").output
        halfway = interruption(stage, ("apply a",), "apply b")
        old = stage.reset("apply a")
        stage.fail("apply b", Interrupt(stage, halfway))
        assert stage.pending()
        done = stage.run("recover", "-o", "json")
        assert "an interrupted run was undone" in json.loads(done.output)["reason"]
        assert stage.picture().state == old.state
        assert not stage.pending()
        assert "nothing was interrupted" in stage.run("recover").output
    finally:
        stage.close()


PLANS = [CapturePlan(), CapturePlan(ipv6="skip"), CapturePlan(comments=True)]


@each_backend
def test_rollback_brings_back_earlier_states_and_before_the_first_nothing_of_ours(netns: Netns, backend: str) -> None:
    with netapply.open(netns.path) as capture:
        for plan in PLANS:
            assert capture.apply(plan, backend=backend).changed
        assert not capture.apply(PLANS[2]).changed  # no state of its own
        assert capture.rollback().changed
        assert capture.verify(PLANS[1]).same
        assert capture.rollback(3).changed
        assert capture.verify(PLANS[0]).same
        assert capture.verify().same
        assert capture.rollback(5).changed
        assert capture.show() == ()
        assert capture.rollback().changed
        assert capture.verify(PLANS[0]).same
        capture.clean()
        with pytest.raises(NetapplyError, match="knows of no state"):
            capture.rollback()


def test_only_so_many_states_are_kept(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path, state_directory=str(tmp_path / "state")) as capture:
        for number in range(KEPT + 3):
            capture.apply(PLANS[number % 2])
        with pytest.raises(NetapplyError, match="there is no state"):
            capture.rollback(KEPT + 1)
        assert capture.rollback(KEPT).reason == f"state {KEPT + 2 - KEPT}"
        names = [path.name for path in (tmp_path / "state").iterdir()]
        assert sum(bool(re.fullmatch(r"[\d-]+\.\d", name)) for name in names) == KEPT
        capture.clean()
        assert [path.name for path in (tmp_path / "state").iterdir()] == ["history"]


def test_rollback_to_a_state_of_another_dialect_is_refused(netns: Netns) -> None:
    with netapply.open(netns.path) as capture:
        capture.apply(PLANS[0], backend="nftables")
        capture.rollback()
        capture.apply(PLANS[0], backend="iptables-nft")
        with pytest.raises(ConflictError, match="held by nftables"):
            capture.rollback(2)


def test_the_history_says_who_when_why_and_is_read_without_the_namespace(netns: Netns, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with netapply.open(netns.path, state_directory=state) as capture:
        capture.apply(PLANS[0], fingerprint="abc", reason="the mesh begins")
        capture.apply(PLANS[0])
        capture.apply(PLANS[1])
        capture.rollback(reason="it did not work")
        capture.clean()
        mine = history.identity_of(capture.namespace.identity)
    found = history.events(Journal(state))
    assert [event.operation for event in found] == ["apply", "apply", "rollback", "clean"]
    assert found == history.events(Journal(state), mine)
    assert not history.events(Journal(state), "1-2-3")
    assert [event.state for event in found] == [0, 1, 2, 0]
    assert (found[0].reason, found[0].fingerprint, found[0].result) == ("the mesh begins", "abc", "done")
    assert (found[0].uid, found[0].pid) == (os.getuid(), os.getpid())


def test_the_history_is_bounded_and_lines_that_are_torn_are_left_out(
    netns: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "LIMIT", 1000)
    state = tmp_path / "state"
    with netapply.open(netns.path, state_directory=str(state)) as capture:
        for number in range(20):
            capture.apply(PLANS[number % 2], reason="x" * 5000)
    assert sum(path.stat().st_size for path in state.glob("history*")) < 4000
    with (state / "history").open("ab") as file:
        file.write(b'[1.0, "torn')
    before = history.events(Journal(str(state)))
    assert before
    assert before[-1].state == 19


def test_a_change_that_failed_is_in_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(Case("nftables", "redirect", "IPv4"))
    try:
        stage.reset("apply a")
        refusal = refusals.Refusal("", 105, ("sendto",), after=True)
        count = 0
        for at in range(40):
            fault: Fault = refusals.Refused(refusal, at)
            count += "as it was" in stage.fail("apply b", fault).output
            stage.reset("apply a")
        told = [event.result for event in history.events(Journal(str(stage.state)))]
        assert count
        assert told.count("failed, as it was") == count
    finally:
        stage.close()


def test_the_fake_rolls_back_as_the_real_one_does() -> None:
    kernel = FakeKernel()
    with kernel.open("pod") as capture:
        for plan in PLANS:
            capture.apply(plan)
        capture.rollback(2)
        assert capture.verify(PLANS[0]).same
        capture.rollback(4)
        assert capture.show() == ()
        assert not capture.recover().changed
        capture.clean()
        with pytest.raises(NetapplyError, match="no state"):
            capture.rollback()
