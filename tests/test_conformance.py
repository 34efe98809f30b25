"""The conformance suite: our backends pass level core, a backend that is wrong does not, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

import netapply
from netapply.backend import BUILT_IN, Backend, find_backend
from netapply.backend import Probe as Found
from netapply.conformance import cgroups, machine
from netapply.conformance.case import (
    APP,
    DIRECT,
    DROPPED,
    LEVELS,
    PROXY,
    REFUSED,
    ROOT,
    Case,
    Outcome,
    Probe,
    Seen,
    captured,
    difference,
)
from netapply.conformance.cases import all_cases, cases_of
from netapply.conformance.cases.words import DNS, IN, OUT, into, out
from netapply.conformance.flows import flow_of, verdict_of
from netapply.conformance.prober import Prober
from netapply.conformance.runner import Runner
from netapply.conformance.stage import make_cgroups, plan_from
from netapply.conformance.world import BY_DEVICE, World
from netapply.decide import decide
from netapply.flow import Flow, FlowState
from netapply.ruleset import Ruleset

COMMAND = [sys.executable, "-m", "netapply", "conform"]
PLUGIN = [sys.executable, "-m", "pytest", "-q", "-p", "netapply.conformance.plugin", "-p", "no:cacheprovider"]


def run(*command: str, check: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout


# --- the cases as data ---------------------------------------------------------------------------------------------


def test_there_are_at_least_300_cases_and_each_has_a_name_of_its_own() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) >= 300
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def cgroups_of_cases() -> Iterator[None]:
    make_cgroups()
    yield
    cgroups.remove()


def _flow(probe: Probe, state: FlowState | None) -> Flow:
    return flow_of(probe)._replace(state=state) if state else flow_of(probe)


@pytest.mark.usefixtures("cgroups_of_cases")
def test_what_cases_expect_is_what_the_specification_decides() -> None:
    """Written by hand and computed: two ways to the same verdict.

    Not where sockets show something else: nobody listens, a policy rule keeps the marked, or counters are looked at.
    """
    wrong = [
        f"{case.name}: {probe} expects {probe.expect}, decided is {verdict}"
        for case in all_cases()
        if not case.absent and case.story not in ("foreign", "model")
        for plan, probes, state in (
            (case.plan, case.probes, "picked-up" if case.story == "older" else None),
            (case.update if case.update or case.story not in ("apply", "older") else case.plan, case.after, None),
        )
        for probe in probes
        if not (probe.mark and probe.expect.by == "tproxy")
        if (verdict := verdict_of(decide(plan_from(plan), _flow(probe, state))))[:2] != probe.expect[:2]
    ]
    assert not wrong


def test_a_level_has_the_cases_of_those_below_it() -> None:
    core, full, stress = ({case.name for case in cases_of(level)} for level in LEVELS)
    assert core < full < stress
    assert [case.name for case in cases_of("full", "proxy: its uid is exempt")] == ["proxy: its uid is exempt"]


@pytest.mark.parametrize(
    ("expect", "seen", "wrong"),
    [
        (DIRECT, Seen("answered", "remote", 80, ("10.77.0.1", 80)), False),
        (DIRECT, Seen("answered", "pod", 15001, ("127.0.0.1", 15001), ("10.77.0.1", 80)), True),
        (OUT, Seen("answered", "pod", 15001, ("127.0.0.1", 15001), ("10.77.0.1", 80)), False),
        (OUT, Seen("answered", "pod", 15001, ("127.0.0.1", 15001), ("10.77.0.1", 81)), True),
        (OUT, Seen("answered", "pod", 15001, ("127.0.0.1", 15001)), True),
        (OUT, Seen("answered", "pod", 15006, ("127.0.0.1", 15006), ("10.77.0.1", 80)), True),
        (OUT, Seen("unanswered", "pod", 15001, ("127.0.0.1", 15001), ("10.77.0.1", 80)), True),
        (OUT, Seen("silent"), True),
        (captured(15006, "tproxy"), Seen("answered", "pod", 15006, ("10.77.0.1", 80)), False),
        (captured(15006, "tproxy"), Seen("answered", "pod", 15006, ("10.77.0.1", 15006), ("10.77.0.1", 80)), True),
        (DROPPED, Seen("silent"), False),
        (DROPPED, Seen("refused"), True),
        (DROPPED, Seen("answered", "remote", 80, ("10.77.0.1", 80)), True),
        (DIRECT, Seen("answered", "remote", 80, ("10.77.0.1", 80), peer=("10.0.0.1", 1)), True),
    ],
)
def test_a_difference_is_told(expect: Any, seen: Seen, *, wrong: bool) -> None:
    assert bool(difference(Probe("pod", "tcp", "10.77.0.1", 80, expect), seen)) is wrong


# --- the suite on our backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BUILT_IN)
def test_our_backends_pass_level_core(backend: str, figure: Any, tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    found = json.loads(run(*COMMAND, "--backend", backend, "-o", "json", "--junit", str(report)))
    assert found["failed"] == 0
    assert found["passed"] >= 100
    suite = ET.parse(report).getroot()
    assert (suite.get("tests"), suite.get("failures")) == (str(len(found["outcomes"])), "0")
    assert found["rate"] >= 150
    figure(f"{found['passed']} cases, {found['probes']} probes at {found['rate']:.0f}/s, {found['seconds']:.1f} s")


def test_pytest_runs_a_case_as_a_test() -> None:
    words = ("--netapply-backend", "nftables", "--netapply-case", "proxy: its *id is exempt")
    assert "2 passed" in run(*PLUGIN, "--pyargs", "netapply.conformance.suite", *words)


# --- backends that are wrong ---------------------------------------------------------------------------------------


@contextmanager
def mistaken(monkeypatch: pytest.MonkeyPatch, mistake: Any) -> Iterator[str]:
    """A backend that spells another rule set than it is asked for, and finds that right."""
    right = find_backend("nftables")

    class Mistaken:
        name = right.name
        dialect = right.dialect
        probe, detect, read, commit = right.probe, right.detect, right.read, right.commit
        render, render_rule = right.render, right.render_rule

        def encode(self, current: Any, desired: Ruleset | None) -> Any:
            return right.encode(current, None if desired is None else mistake(desired))

    wrong: Backend = Mistaken()  # type: ignore[assignment]
    for module in ("netapply.core", "netapply.detection", "netapply.conformance.runner"):
        monkeypatch.setattr(f"{module}.find_backend", lambda name: wrong if name == right.name else find_backend(name))
    yield right.name


def outcome_of(backend: str, case: Case) -> Outcome:
    with Runner(backend) as runner:
        return runner.run(case)


def _leave_out(kind: str) -> Any:
    """A mistake: rules with this statement are not spelled."""

    def mistake(ruleset: Ruleset) -> Ruleset:
        def without(chain: Any) -> Any:
            return chain._replace(rules=tuple(rule for rule in chain.rules if rule.statement.kind != kind))

        return ruleset._replace(tables=tuple(t._replace(chains=tuple(map(without, t.chains))) for t in ruleset.tables))

    return mistake


@pytest.mark.parametrize(
    ("kind", "name"),
    [("redirect", "outbound: TCP to anywhere is captured"), ("return", "proxy: its uid is exempt")],
)
def test_a_backend_that_leaves_rules_out_is_caught_by_packets(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(each for each in all_cases() if each.name == name)
    assert outcome_of("nftables", case).status == "passed"
    with mistaken(monkeypatch, _leave_out(kind)) as backend:
        outcome = outcome_of(backend, case)
    assert outcome.status == "failed"
    assert any("expected" in each for each in outcome.differences), outcome.differences


def test_rules_that_stay_after_clean_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netapply.api.Capture.clean", lambda self, **_: type("Done", (), {"changed": False}))
    outcome = outcome_of("nftables", Case("made up", "core", {}, out(OUT)))
    assert "clean left rules of ours" in outcome.differences


def test_a_skip_says_what_is_missing_and_how_that_was_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> Any:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("netapply.conformance.conntrack.entries", denied)
    outcome = outcome_of("nftables", Case("made up", "core", {}, out(OUT), all_replied=True))
    assert (outcome.status, outcome.differences) == ("skipped", ())
    assert "conntrack listing: dumped the namespace's connection tracking table: Operation not per" in outcome.skipped


def test_a_backend_that_does_not_work_here_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = Found("unsupported", "this kernel has no nf_tables")
    monkeypatch.setattr(type(find_backend("nftables")), "probe", lambda *_: lacking)
    with Runner("nftables") as runner:
        outcome = runner.run(all_cases()[0])
        assert outcome.skipped == "nftables is unsupported: this kernel has no nf_tables"
        assert not runner.report([outcome]).good


def test_new_taint_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.Machine(0, machine.look().log)
    monkeypatch.setattr(machine, "look", lambda: machine.Machine(512, before.log))
    assert machine.since(before).taint == 512


# --- readers, the command, and the end -----------------------------------------------------------------------------


def test_readers_see_what_stands_and_what_they_say_counts() -> None:
    seen: list[str] = []

    def reader(standing: Any) -> list[str]:
        seen.append(f"{standing.backend} {standing.layout} {len(standing.ruleset.tables)}")
        return ["another reader says otherwise"]

    with Runner("nftables", [reader]) as runner:
        outcome = runner.run(Case("made up", "core", {}, (*out(OUT), *into(IN))))
    assert seen == ["nftables netapply 1"]
    assert outcome.differences == ("another reader says otherwise",)


def test_the_command_lists_cases_and_knows_no_others() -> None:
    assert "core   proxy: its uid is exempt" in run(*COMMAND, "--backend", "nftables", "--list")
    run(*COMMAND, "--backend", "nftables", "-k", "no such case", check=1)
    run(*COMMAND, "--backend", "no-such-backend", check=1)


def test_the_table_tells_of_cases_probes_and_time() -> None:
    table = run(*COMMAND, "--backend", "nftables", "-k", "ipv6 block: what")
    assert "ABOUT  CASES  PASSED  FAILED  SKIPPED  PROBES  SECONDS" in " ".join(table.split("\n")[1:2])
    assert "nftables conforms" in table


def _of_process(pid: int) -> list[Path]:
    """All that a run of this process has outside of its namespaces."""
    cgroup_root = Path(cgroups.directory()).parent
    places = {
        Path("/run/netns"): f"netapply-lab-{pid}-*",
        Path(tempfile.gettempdir()): f"netapply-conformance-{pid}-*",
        cgroup_root: f"netapply-conformance-{pid}",
    }
    return [found for place, pattern in places.items() if place.is_dir() for found in place.glob(pattern)]


def _until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_nothing_is_left_behind_when_it_is_killed() -> None:
    process = subprocess.Popen([*COMMAND, "--backend", "nftables"], stdout=subprocess.DEVNULL)
    assert _until(lambda: bool(_of_process(process.pid)))
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert _until(lambda: not _of_process(process.pid))


def test_nothing_is_left_behind_when_it_ends() -> None:
    process = subprocess.Popen([*COMMAND, "--backend", "nftables", "-k", "lo: captured"], stdout=subprocess.DEVNULL)
    assert process.wait(60) == 0
    assert not _of_process(process.pid)


# --- the prober ----------------------------------------------------------------------------------------------------


def test_without_rules_everything_is_direct_and_thousands_fit_in_a_test_run(figure: Any) -> None:
    ways = [
        *(
            probe
            for name in BY_DEVICE
            for probe in (*into(DIRECT, device=name), *out(DIRECT, "elsewhere", device=name))
        ),
        *(probe for who in (APP, PROXY, ROOT) for probe in (*out(DIRECT, "pod", 8080, sender=who), *out(DIRECT))),
        *(probe for port in (1, 53, 65535) for probe in (*into(DIRECT, port, "udp"), *out(DIRECT, port=port))),
        *into(DIRECT, state="invalid"),
        *out(REFUSED, "pod", 9),
    ]
    with World() as world, Prober(world) as prober:
        prober.arrange(absent=(9,))
        for _ in range(20):
            assert [difference(*each) for each in zip(ways, prober.send(ways), strict=True)] == [""] * len(ways)
        assert prober.sent / prober.seconds >= 150
        figure(f"{prober.sent} probes at {prober.sent / prober.seconds:.0f} a second")


def test_a_fired_probe_is_one_packet_and_nobody_answers() -> None:
    probes = [*out(OUT, port=80), *out(OUT, port=81), *out(DNS, port=53, protocol="udp"), *into(IN)]
    with World() as world, Prober(world) as prober, netapply.open(world.pod.path) as capture:
        capture.apply(plan_from({"dns": {"capture": "all"}}), backend="nftables")
        prober.arrange((15001, 15006, 15053))
        prober.fire(probes)
        counted = [rule.packets for rule in capture.show() if "redirect to" in rule.rule and rule.packets]
        assert sorted(counted) == [2, 2, 4]


def test_an_answer_that_does_not_come_back_is_not_taken_for_one() -> None:
    """The listener has the packet, and the remote side has lost its way back."""
    with World() as world, Prober(world) as prober:
        batch = prober.open(out(DIRECT, protocol="udp", only=("ip",)))
        remove = ["nsenter", f"--net={world.remote.path}", "ip", "route", "del", "10.77.0.0/24", "table", "main"]
        subprocess.run(remove, check=True, timeout=10)
        remove[-1] = "local"
        subprocess.run(remove, check=True, timeout=10)
        with batch:
            assert [each.fate for each in batch.run()] == ["unanswered"]
