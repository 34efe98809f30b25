"""Circumstances that users meet: read-only directories, IPv6 off, garbage in the journal, outputs that break."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import netapply
from netapply.backend import BUILT_IN, find_backend
from netapply.errors import JournalError, KernelError, LockError, UnsupportedError
from netapply.features import degrade
from netapply.journal import Journal, State
from netapply.plan import CapturePlan, Cgroup, Inbound, Outbound, OwnerRules, Owners
from netapply.ruleset import Chain, Jump, Routing, Rule, Ruleset, Table
from tests import foreign
from tests.netns import Netns

COMMAND = [sys.executable, "-m", "netapply"]
each_backend = pytest.mark.parametrize("backend", tuple(BUILT_IN))


def run(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, **more)  # type: ignore[call-overload]


@each_backend
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_where_ipv6_is_off_its_addresses_are_left_out_and_its_rules_stand(
    netns: Netns, backend: str, mode: str
) -> None:
    netns.run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
    plan = CapturePlan(inbound=Inbound(mode=mode))  # type: ignore[arg-type]  # one of the two literals
    with netapply.open(netns.path) as capture:
        result = capture.apply(plan, backend=backend)
        assert any(line.startswith("ipv6: switched off") for line in result.degraded)
        assert any("::6" in rule.rule or "ip6" in rule.rule for rule in capture.show())
        assert not capture.apply(plan).changed
        assert capture.verify().same
        assert capture.diff(plan).same
        capture.clean()


def test_a_read_only_default_state_directory_is_done_without(netns: Netns, tmp_path: Path) -> None:
    """An init container with a read-only root: applied all the same, and said so."""
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1"}')
    script = (
        "mount -t tmpfs none /run && mkdir -m 700 /run/netapply && mount -o remount,ro /run && unset NETAPPLY_STATE_DIR"
        f" && exec {sys.executable} -m netapply apply {plan} -N {netns.path} -o json"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["changed"]
    assert any(line.startswith("journal: none is kept") for line in told["degraded"])


@pytest.mark.parametrize("kind", ["file", "link", "not private"])
def test_a_state_directory_that_was_asked_for_must_be_usable(netns: Netns, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "state"
    if kind == "file":
        place.write_text("")
    elif kind == "link":
        place.symlink_to(tmp_path)
    else:
        place.mkdir(mode=0o755)
    said = {"file": "Not a directory", "link": "is a symbolic link", "not private": "mode 0700"}[kind]
    with netapply.open(netns.path, state_directory=str(place)) as capture, pytest.raises(JournalError, match=said):
        capture.apply(CapturePlan())
    assert netns.run("nft", "list", "ruleset") == ""


@pytest.mark.parametrize("garbage", [b"", b"nonsense", b"00000000 {}", b'{"format": 1}\n'])
def test_a_journal_that_cannot_be_trusted_is_set_aside(netns: Netns, tmp_path: Path, garbage: bytes) -> None:
    with netapply.open(netns.path, state_directory=str(tmp_path / "state")) as capture:
        capture.apply(CapturePlan())
        kept = (tmp_path / "state").iterdir()
        (journal,) = (path for path in kept if path.suffix != ".lock" and path.name != "history")
        journal.write_bytes(garbage)
        result = capture.apply(CapturePlan())
        assert "set aside" in result.notes[0]
        assert journal.with_name(journal.name + ".bad").exists()
        assert capture.verify().same


def test_a_namespace_has_one_writer_at_a_time(netns: Netns) -> None:
    with netapply.open(netns.path, lock_timeout=0.1) as capture:
        files = Journal().acquire(capture.namespace.identity, 1)
        with pytest.raises(LockError, match="another netapply"):
            capture.apply(CapturePlan())
        files.close()
        assert capture.apply(CapturePlan()).changed


def test_the_first_users_of_a_state_directory_do_not_trip_over_one_another(
    make_netns: Callable[[], Netns], tmp_path: Path
) -> None:
    failures: list[BaseException] = []

    def first(netns: Netns, place: str) -> None:
        try:
            with netapply.open(netns.path, state_directory=place) as capture:
                capture.apply(CapturePlan(ipv6="skip"))
        except BaseException as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    for attempt in range(10):
        place = str(tmp_path / str(attempt))
        threads = [threading.Thread(target=first, args=(make_netns(), place)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_errors_of_the_command_line_come_in_the_form_that_was_asked_for() -> None:
    done = run("apply", "-o", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["kind"] == "UsageError"
    assert run("apply", "x", "--lock-timeout", "nan").returncode == 1
    assert run("nonsense").stderr.startswith("usage: netapply")


def test_output_that_nobody_reads_changes_no_exit_code(netns: Netns, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1"}')
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone, Path("/dev/full").open("w") as full:
        for output, code in ((gone, 0), (full, 1)):
            done = subprocess.run(
                [*COMMAND, "apply", str(plan), "-N", netns.path],
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == code, done.stderr
            assert "Traceback" not in done.stderr


@each_backend
def test_without_privileges_nothing_happens_and_the_way_out_is_named(
    netns: Netns, backend: str, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1"}')
    command = [*COMMAND, "apply", str(plan), "--backend", backend, "--state-dir", str(tmp_path / "s")]
    shown = netns.run("setpriv", "--bounding-set=-all", "--inh-caps=-all", *command, check=False)
    assert "Traceback" not in shown
    assert netns.run("nft", "list", "ruleset") == ""


def test_clean_works_after_a_damaged_and_interrupted_run(netns: Netns, tmp_path: Path) -> None:
    """The state before cannot be put back, as somebody wrote into a chain of ours: clean does not need it."""
    before = foreign.picture(netns)
    state = tmp_path / "state"
    with netapply.open(netns.path, state_directory=str(state)) as capture:
        capture.apply(CapturePlan(ipv6="skip"), backend="iptables-nft")
        netns.run("iptables-nft", "-t", "nat", "-A", "NETAPPLY_OUTBOUND", "-m", "ttl", "--ttl-eq", "5", "-j", "RETURN")
        (journal,) = (path for path in state.iterdir() if path.suffix != ".lock" and path.name != "history")
        files = Journal(str(state)).acquire(capture.namespace.identity, 1)
        entry = files.load()
        assert entry
        files.begin(entry._replace(before=entry.desired))
        files.close()
        assert journal.exists()
        assert capture.clean().changed
    assert foreign.picture(netns) == before


def test_a_dialect_that_could_not_be_read_is_not_taken_for_empty(netns: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a second copy of ours could be put beside the first, in another dialect."""

    def failing(*_: object) -> bool:
        raise KernelError("list tables", errno.ENOBUFS)

    monkeypatch.setattr(type(find_backend("iptables-nft")), "detect", failing)
    with netapply.open(netns.path) as capture, pytest.raises(KernelError, match="ENOBUFS"):
        capture.apply(CapturePlan())
    assert netns.run("nft", "list", "ruleset") == ""


def test_capture_by_cgroups_alone_is_never_degraded_to_no_capture() -> None:
    only = OwnerRules(include=Owners(cgroups=(Cgroup("a/b", 7),)))
    plan = CapturePlan(outbound=Outbound(owners=only), prefer=("cgroups",))
    with pytest.raises(UnsupportedError, match="nothing would be captured"):
        degrade(plan, "nftables", {"cgroups": "no module"})


def test_clean_leaves_no_file_but_the_history_behind(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path, state_directory=str(tmp_path / "state")) as capture:
        capture.apply(CapturePlan())
        assert list((tmp_path / "state").iterdir())
        capture.clean()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["history"]


def test_a_run_that_cannot_be_undone_is_over_once_a_plan_holds(netns: Netns, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with netapply.open(netns.path, state_directory=state) as capture:
        capture.apply(CapturePlan(), backend="nftables")
        files = Journal(state).acquire(capture.namespace.identity, 1)
        entry = files.load()
        assert entry
        strange = Ruleset((Table("inet", "netapply", (Chain("nat-output", (Rule((), Jump("<x>")),)),)),))
        files.begin(entry._replace(before=State(strange, Routing()), desired=State(None, Routing())))
        files.close()
        result = capture.apply(CapturePlan())
        assert not result.changed
        assert "could not be undone" in result.notes[0]
        assert capture.verify().same
        assert not capture.apply(CapturePlan()).notes
