"""The fake kernel, as somebody's unit tests use it. What it shares with the real one is in test_api.py."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from mypy import api as mypy

import netapply
from netapply.api import Capture
from netapply.backend import BUILT_IN, Probe
from netapply.compiler import compile_plan
from netapply.decide import decide
from netapply.errors import (
    ApplyError,
    ConflictError,
    KernelError,
    LockError,
    NamespaceError,
    UnsupportedError,
)
from netapply.flow import TCP, Flow
from netapply.plan import CapturePlan, Cgroup, Inbound, OwnerRules, Owners
from netapply.ruleset import LocalAddress, Routing
from netapply.testing import FakeCapture, FakeKernel
from tests.strategies import flows, plans

PLAN = CapturePlan()
OTHER = CapturePlan(inbound=Inbound("none"))
TPROXY = CapturePlan(inbound=Inbound("tproxy"))
METHODS = [name for name in vars(Capture) if not name.startswith("_")]
CALL = Flow("outbound", TCP, b"\x0a\0\0\5", b"\x0a\0\1\x09", 40000, 443, uid=1000, gid=1000)
ENOMEM = KernelError("add rule", 12)

each_backend = pytest.mark.parametrize("backend", BUILT_IN)


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def capture(kernel: FakeKernel) -> FakeCapture:
    return kernel.open("pod-1")


def test_it_is_a_capture_to_the_type_checker(tmp_path: Path) -> None:
    """As the real one is; so code that takes either is checked once."""
    program = tmp_path / "program.py"
    program.write_text(
        """
from collections.abc import Callable
from netapply.api import Capture, CaptureLike, open_capture
from netapply.testing import FakeCapture, FakeKernel

def captures(real: Capture, fake: FakeCapture) -> list[CaptureLike]:
    return [real, fake]

openers: list[Callable[[str], CaptureLike]] = [open_capture, FakeKernel().open]
"""
    )
    said, trouble, status = mypy.run(["--strict", str(program)])
    assert not status, said + trouble


@pytest.mark.parametrize("name", METHODS)
def test_its_methods_take_what_the_real_ones_take(name: str) -> None:
    assert _parameters(getattr(FakeCapture, name)) == _parameters(getattr(Capture, name))


def test_it_is_opened_as_the_real_one_is(kernel: FakeKernel) -> None:
    assert _parameters(kernel.open) == _parameters(netapply.open)


def _parameters(function: Callable[..., object]) -> list[tuple[str, object, object]]:
    """Name, kind and default of each; a default that is a function counts by being one."""
    found = inspect.signature(function).parameters.values()
    return [(each.name, each.kind, callable(each.default) or each.default) for each in found]


def test_what_is_applied_can_be_looked_at(kernel: FakeKernel) -> None:
    with kernel.open("pod-1") as capture:
        capture.apply(PLAN, backend="nftables")
    namespace = kernel.namespaces["pod-1"]
    assert list(namespace.rulesets) == ["nftables"]
    assert [table.name for table in namespace.rulesets["nftables"].tables] == ["netapply"]
    assert namespace.routing == Routing(addresses=(LocalAddress(b"\0" * 15 + b"\6"),))


def test_namespaces_are_apart(kernel: FakeKernel) -> None:
    kernel.open("pod-1").apply(PLAN)
    assert kernel.open("pod-2").show() == ()
    assert not kernel.open("pod-1").apply(PLAN).changed


def test_clean_takes_the_routing_too(kernel: FakeKernel, capture: FakeCapture) -> None:
    capture.apply(TPROXY)
    assert kernel.namespaces["pod-1"].routing.rules
    steps = capture.clean().steps
    assert kernel.namespaces["pod-1"].routing == Routing()
    assert steps[0] == "replace table inet netapply"
    assert "delete policy rule ip pref 13370 fwmark 0x539/0xffffffff lookup 133" in steps


@each_backend
@given(plan=plans, flow=flows())
def test_what_is_sent_meets_the_fate_that_the_plan_wants(backend: str, plan: CapturePlan, flow: Flow) -> None:
    capture = FakeKernel().open("pod-1")
    capture.apply(plan, backend=backend)
    assert capture.send(flow).same_as(decide(plan, flow))


def test_nothing_is_captured_where_nothing_was_applied(capture: FakeCapture) -> None:
    assert capture.send(CALL).verdict == "bypass"


def test_what_is_sent_is_counted_by_every_rule_that_matches(capture: FakeCapture) -> None:
    capture.apply(PLAN, backend="iptables-nft")
    for _ in range(3):
        assert capture.send(CALL, size=100).port == 15001
    counted = [(rule.chain, rule.packets, rule.bytes) for rule in capture.show() if rule.packets]
    assert counted == [("OUTPUT", 3, 300), ("NETAPPLY_OUTBOUND", 3, 300)]


def test_chains_that_another_plan_leaves_alone_keep_counting(capture: FakeCapture) -> None:
    capture.apply(PLAN)
    capture.send(CALL)
    capture.apply(OTHER)
    assert {rule.chain for rule in capture.show() if rule.packets} == {"nat-output", "nat-outbound"}
    capture.apply(OTHER._replace(proxy=PLAN.proxy._replace(outbound_port=16001)))
    assert {rule.chain for rule in capture.show() if rule.packets} == {"nat-output"}


def test_open_connections_that_are_now_treated_otherwise_are_counted(kernel: FakeKernel, capture: FakeCapture) -> None:
    kernel.namespaces["pod-1"].flows = (CALL, CALL._replace(uid=1337, gid=1337))
    assert capture.apply(PLAN).existing_flows == 1
    assert capture.apply(PLAN).existing_flows == 0


@each_backend
def test_a_drifted_rule_is_gone_until_the_next_apply(kernel: FakeKernel, capture: FakeCapture, backend: str) -> None:
    capture.apply(PLAN, backend=backend)
    before = capture.show()
    for position in range(len(before)):
        lost = kernel.drift("pod-1", position)
        assert len(capture.show()) == len(before) - 1
        (change,) = capture.verify().changes
        assert (change.what, change.path) == (before[position].rule, lost.path)
        assert capture.apply(PLAN).changed
        assert capture.verify(PLAN).same


def test_there_is_nothing_to_drift_in_an_empty_namespace(kernel: FakeKernel) -> None:
    with pytest.raises(LookupError):
        kernel.drift("pod-1")


def test_a_planned_failure_happens_once_and_only_where_something_changes(
    kernel: FakeKernel, capture: FakeCapture
) -> None:
    capture.apply(PLAN)
    kernel.fail_next("apply", ENOMEM)
    assert not capture.apply(PLAN).changed
    with pytest.raises(ApplyError) as caught:
        capture.apply(OTHER)
    assert (caught.value.restored, caught.value.__cause__) == (True, ENOMEM)
    assert capture.verify().same
    assert capture.verify(PLAN).same
    assert capture.apply(OTHER).changed


def test_a_clean_that_fails_rolls_back(kernel: FakeKernel, capture: FakeCapture) -> None:
    capture.apply(PLAN)
    kernel.fail_next("clean", ENOMEM)
    with pytest.raises(ApplyError):
        capture.clean()
    assert capture.verify().same


def test_a_roll_back_that_does_not_hold_can_be_planned(kernel: FakeKernel, capture: FakeCapture) -> None:
    error = ApplyError("batch", ENOMEM, restored=False, rollback=ENOMEM)
    kernel.fail_next("apply", error)
    with pytest.raises(ApplyError) as caught:
        capture.apply(PLAN)
    assert caught.value is error


@pytest.mark.parametrize("operation", ["open", "diff", "verify", "show", "detect"])
def test_a_look_that_fails_raises_what_was_planned(kernel: FakeKernel, capture: FakeCapture, operation: str) -> None:
    works = {
        "open": lambda: kernel.open("pod-1"),
        "diff": lambda: capture.diff(PLAN),
        "verify": lambda: capture.verify(PLAN),
        "show": capture.show,
        "detect": capture.detect,
    }
    error = LockError("held by iptables (4711)")
    kernel.fail_next(operation, error)
    with pytest.raises(LockError) as caught:
        works[operation]()
    assert caught.value is error
    works[operation]()


def test_a_backend_that_does_not_work_is_passed_over(kernel: FakeKernel, capture: FakeCapture) -> None:
    kernel.probes["nftables"] = Probe("denied", "needs CAP_NET_ADMIN")
    found = capture.detect()
    assert (found.chosen, found.candidates[0].status) == ("iptables-nft", "denied")
    assert capture.apply(PLAN).backend == "iptables-nft"
    with pytest.raises(UnsupportedError, match="nftables is denied here: needs CAP_NET_ADMIN"):
        kernel.open("pod-2").apply(PLAN, backend="nftables")


def test_where_no_backend_works_each_says_why(kernel: FakeKernel, capture: FakeCapture) -> None:
    kernel.probes = {name: Probe("unsupported", f"no {name}") for name in BUILT_IN}
    with pytest.raises(UnsupportedError, match=r"no backend works here; nftables: unsupported, no nftables; ipt.*"):
        capture.apply(PLAN)
    assert capture.detect().chosen == ""
    assert capture.clean().changed is False


def test_rules_of_somebody_else_show_in_detection(kernel: FakeKernel, capture: FakeCapture) -> None:
    kernel.probes["iptables-legacy"] = Probe("usable", "the kernel has ip_tables", in_use=True)
    assert [each.in_use for each in capture.detect().candidates] == [False, False, True]


def test_what_a_backend_lacks_is_degraded_in_that_backend_alone(kernel: FakeKernel, capture: FakeCapture) -> None:
    owners = OwnerRules(exclude=Owners(cgroups=(Cgroup("user.slice", 7),)))
    plan = PLAN._replace(outbound=PLAN.outbound._replace(owners=owners), prefer=("cgroups",))
    kernel.missing["nftables"] = {"cgroups": "nft_socket"}
    assert capture.detect().candidates[0].missing == (("cgroups", "nft_socket"),)
    assert capture.apply(plan).degraded == ("cgroups: owners are told by uid and gid alone (nft_socket)",)
    assert kernel.open("pod-2").apply(plan, backend="iptables-nft").degraded == ()


def test_ours_in_two_dialects_is_a_conflict_that_clean_ends(kernel: FakeKernel, capture: FakeCapture) -> None:
    capture.apply(PLAN, backend="nftables")
    legacy = netapply.backend.find_backend("iptables-legacy")
    kernel.namespaces["pod-1"].put("iptables-legacy", compile_plan(PLAN, legacy.dialect))
    with pytest.raises(ConflictError, match="2 dialects at once: nftables, iptables-legacy"):
        capture.apply(PLAN)
    assert capture.detect().chosen == ""
    assert capture.clean().backend == "nftables, iptables-legacy"
    assert kernel.namespaces["pod-1"].rulesets == {}


def test_the_machines_own_namespace_is_refused_without_host(kernel: FakeKernel) -> None:
    with pytest.raises(NamespaceError, match="pid:1 is the machine's own"):
        kernel.open("pid:1")
    kernel.open("pid:1", host=True).apply(PLAN)
    kernel.open().apply(PLAN)
    kernel.initial.add(None)
    with pytest.raises(NamespaceError):
        kernel.open()


def test_of_two_threads_at_one_namespace_the_second_waits(kernel: FakeKernel) -> None:
    begun, go_on, changed = threading.Event(), threading.Event(), []

    def held() -> bool:
        begun.set()
        return not go_on.wait(10)

    first = threading.Thread(target=lambda: changed.append(kernel.open("pod-1").apply(PLAN, cancelled=held).changed))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=lambda: changed.append(kernel.open("pod-1").apply(PLAN).changed))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    go_on.set()
    for thread in (first, second):
        thread.join(10)
    assert changed == [True, False]
