"""What the core promises of every dialect: no program, no change twice, no trace after clean, all or nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import netapply
from netapply import routing
from netapply.api import Capture
from netapply.backend import BUILT_IN, find_backend
from netapply.errors import ApplyError, ConflictError, KernelError
from netapply.namespace import Namespace
from netapply.plan import CapturePlan, Dns, Inbound, InboundPorts, OutboundCidrs
from netapply.ruleset import Cidr, PortRange
from netapply_wire.nfnetlink import generation
from tests import foreign
from tests.netns import Netns

COMMAND = [sys.executable, "-m", "netapply"]
BACKENDS = tuple(BUILT_IN)

each_backend = pytest.mark.parametrize("backend", BACKENDS)

CIDRS = tuple(Cidr(bytes((10, 0, i, 0)), 24) for i in range(0, 80, 2))
FULL = CapturePlan(
    inbound=Inbound(mode="tproxy", ports=InboundPorts(exclude=(PortRange(15020, 15021), PortRange(15090, 15090)))),
    outbound=CapturePlan().outbound._replace(cidrs=OutboundCidrs(exclude=CIDRS)),
    dns=Dns("all"),
    invalid="drop",
    comments=True,
)
PLANS = {
    "redirect": CapturePlan(),
    "everything": FULL,
    "blocked": FULL._replace(ipv6="block", inbound=Inbound()),
    "v4 only": CapturePlan(ipv6="skip"),
}


@pytest.fixture
def capture(netns: Netns) -> Capture:
    return netapply.open(netns.path)


@each_backend
@pytest.mark.parametrize("name", PLANS)
def test_apply_then_clean_leaves_no_trace_among_foreign_rules(netns: Netns, backend: str, name: str) -> None:
    """Byte for byte in every save, listing, rule and route, counters of foreign rules included."""
    foreign.put_up(netns, backend)
    before = foreign.picture(netns)
    with netapply.open(netns.path) as capture:
        assert capture.apply(PLANS[name], backend=backend).changed
        during = foreign.picture(netns)
        assert capture.clean().changed
    assert before == foreign.picture(netns)
    assert before != during


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
@pytest.mark.parametrize("name", PLANS)
def test_apply_then_clean_leaves_an_empty_namespace_empty(netns: Netns, backend: str, name: str) -> None:
    """iptables-legacy apart: the kernel cannot give up a legacy table once it is there."""
    before = foreign.picture(netns)
    with netapply.open(netns.path) as capture:
        capture.apply(PLANS[name], backend=backend)
        capture.clean()
    assert foreign.picture(netns) == before


@each_backend
@pytest.mark.parametrize("name", PLANS)
def test_a_second_apply_changes_nothing_and_bumps_no_generation(netns: Netns, backend: str, name: str) -> None:
    foreign.put_up(netns, backend)
    with netapply.open(netns.path) as capture:
        capture.apply(PLANS[name], backend=backend)
        before, pictured = _generation(netns), foreign.picture(netns)
        result = capture.apply(PLANS[name])
        assert (result.changed, result.steps, result.backend) == (False, (), backend)
        assert capture.verify().same
        assert capture.diff(PLANS[name]).same
    assert _generation(netns) == before
    assert foreign.picture(netns) == pictured


def _generation(netns: Netns) -> int:
    with Namespace.open(netns.path) as namespace:
        return generation(namespace)


@each_backend
@pytest.mark.parametrize("name", ["redirect", "everything", "blocked"])
def test_a_change_from_any_plan_to_any_other_is_what_apply_gives_afresh(
    make_netns: Callable[[], Netns], backend: str, name: str
) -> None:
    for other in PLANS:
        changed, fresh = make_netns(), make_netns()
        with netapply.open(changed.path) as capture:
            capture.apply(PLANS[other], backend=backend)
            capture.apply(PLANS[name])
            assert capture.verify(PLANS[name]).same
        with netapply.open(fresh.path) as capture:
            capture.apply(PLANS[name], backend=backend)
        if backend != "iptables-legacy":  # where a table once used stays, empty
            assert _lines(changed) == _lines(fresh)


def _lines(netns: Netns) -> dict[str, list[str]]:
    """What there is to see, but for the order in which chains were made: verify has compared the order of rules."""
    return {command: sorted(text.splitlines()) for command, text in foreign.picture(netns).items()}


@each_backend
@pytest.mark.parametrize("start", ["empty", "redirect"])
def test_a_failure_at_any_step_leaves_the_namespace_as_it_was(
    netns: Netns, backend: str, start: str, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    """Every step of a large apply fails in turn, before and after it was done."""
    foreign.put_up(netns, backend)
    with netapply.open(netns.path) as capture:
        if start != "empty":
            capture.apply(PLANS[start], backend=backend)
        before = foreign.picture(netns)
        tried = 0
        for after in (False, True):
            for at in range(100):
                with monkeypatch.context() as patch:
                    fault = _fail_at(patch, backend, at, after=after)
                    try:
                        capture.apply(FULL, backend=backend)
                    except ApplyError as error:
                        assert error.restored, error
                        assert fault.hit
                    else:
                        assert not fault.hit
                        break
                tried += 1
                assert foreign.picture(netns) == before
            if start == "empty":
                capture.clean()
            else:
                capture.apply(PLANS[start])
            assert foreign.picture(netns) == before
        figure(f"{tried} failures injected, each time the namespace as it was")
        assert tried >= 8
        assert capture.apply(FULL, backend=backend).changed


STRANGERS = {
    "nftables": "nft insert rule inet netapply nat-outbound ip ttl 5 return",
    "iptables-nft": "iptables-nft -t nat -I NETAPPLY_OUTBOUND -m ttl --ttl-eq 5 -j RETURN",
    "iptables-legacy": "iptables-legacy -t nat -I NETAPPLY_OUTBOUND -m ttl --ttl-eq 5 -j RETURN",
}


@each_backend
def test_a_strange_rule_among_ours_is_shown_and_put_right(
    netns: Netns, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the first try to put it right fails: then all of ours stands that could be read."""
    plan = PLANS["redirect"]
    with netapply.open(netns.path) as capture:
        capture.apply(plan, backend=backend)
        good = foreign.picture(netns)
        netns.run(*STRANGERS[backend].split())
        found = capture.verify()
        assert [change.kind for change in found.changes] == ["remove"]
        assert any("not one of ours" in rule.rule for rule in capture.show())
        with monkeypatch.context() as patch:
            _fail_at(patch, backend, 0, after=False)
            with pytest.raises(ApplyError):
                capture.apply(plan)
        assert capture.apply(plan).existing_flows == 0
        assert foreign.picture(netns) == good


class _Fault:
    """Counts the commits of rules and routing, and fails one of them, before it is done or after."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.left = at
        self.after = after
        self.hit = False

    def wrap(self, commit: Callable[..., object]) -> Callable[..., object]:
        def committed(*arguments: object) -> object:
            now = self.left == 0
            self.left -= 1
            if now and not self.after:
                self.hit = True
                raise KernelError("injected", 12)
            result = commit(*arguments)
            if now:
                self.hit = True
                raise KernelError("injected", 12)
            return result

        return committed


def _fail_at(patch: pytest.MonkeyPatch, backend: str, at: int, *, after: bool) -> _Fault:
    fault = _Fault(at, after=after)
    chosen = find_backend(backend)
    patch.setattr(type(chosen), "commit", _method(fault.wrap(chosen.commit)))
    patch.setattr(routing, "commit", fault.wrap(routing.commit))
    return fault


def _method(function: Callable[..., object]) -> Callable[..., object]:
    return lambda _self, *arguments: function(*arguments)


@each_backend
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_died_at_any_step_is_resolved_by_the_next_command(
    netns: Netns, backend: str, when: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """The process dies at each step in turn. The next command finishes or undoes it, says so, and clean is clean."""
    foreign.put_up(netns, backend)
    before = foreign.picture(netns)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(netapply.dump_plan(FULL)))
    for at in range(20):
        command = [sys.executable, "-m", "tests.die_at", netns.path, str(plan), backend, str(at), when]
        died = subprocess.run(command, timeout=60, check=False).returncode
        with netapply.open(netns.path) as capture:
            result = capture.clean()
        assert foreign.picture(netns) == before
        if not died:
            figure(f"died at {at} steps in turn, each time resolved, and as before after clean")
            assert at >= 5
            return
        assert died == 9
        assert "interrupted run was" in result.notes[0]
    pytest.fail("the plan has more steps than that")


@each_backend
def test_ours_in_another_dialect_is_refused_and_auto_stays_with_it(capture: Capture, backend: str) -> None:
    capture.apply(CapturePlan(), backend=backend)
    other = next(name for name in BACKENDS if name != backend)
    with pytest.raises(ConflictError, match=backend):
        capture.apply(CapturePlan(), backend=other)
    assert capture.apply(CapturePlan(ipv6="skip")).backend == backend


@each_backend
def test_no_program_is_started_and_no_library_loaded(
    netns: Netns, backend: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """One execve over apply, diff, verify and clean: the interpreter's. With an empty PATH, and without libnftables."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("apiVersion: netapply/v1\ninbound: {mode: tproxy}\ndns: {capture: all}\n")
    target = ["-N", netns.path.replace("self", str(os.getpid()))]
    for command in (
        ["apply", str(plan), *target, "--backend", backend],
        ["diff", str(plan), *target],
        ["verify", *target],
        ["show", *target],
        ["clean", *target],
    ):
        log = tmp_path / "strace"
        done = subprocess.run(
            [
                "/usr/bin/strace",
                "-f",
                "-e",
                "trace=execve,execveat,fork,vfork,openat",
                "-o",
                str(log),
                *COMMAND,
                *command,
            ],
            env={**os.environ, "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        calls = log.read_text()
        started = len(re.findall(r"\b(?:execve|execveat|fork|vfork)\(", calls))
        figure(f"{command[0]}: {started} execve (the interpreter's)")
        assert started == 1
        assert "libnftables" not in calls


def test_the_machines_own_namespace_is_refused_without_host(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1"}')
    done = subprocess.run(
        [*COMMAND, "apply", str(plan), "-o", "json"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["kind"] == "NamespaceError"


def test_bad_input_reports_every_fault_and_touches_nothing(netns: Netns, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "apiVersion: netapply/v1\nproxy: {outbound_port: 0}\noutbound: {cidrs: {exclude: [10.0.0.1/8]}}\nipv4: no\n"
    )
    done = subprocess.run(
        [*COMMAND, "apply", str(plan), "-N", netns.path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    for path in ("proxy.outbound_port", "outbound.cidrs.exclude[0]", "ipv4"):
        assert path in done.stderr
    assert netns.run("nft", "list", "ruleset") == ""


def test_diff_and_verify_have_exit_codes_of_their_own(netns: Netns, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("apiVersion: netapply/v1\n")

    def code(*arguments: str) -> int:
        command = [*COMMAND, *arguments, "-N", netns.path]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode

    assert code("diff", str(plan)) == 2
    assert code("verify") == 1
    assert code("apply", str(plan)) == 0
    assert (code("diff", str(plan)), code("verify")) == (0, 0)
    netns.run("nft", "flush", "chain", "inet", "netapply", "nat-outbound")
    assert (code("diff", str(plan)), code("verify")) == (2, 3)
